"""Full-state checkpoints, written while training goes on.

    with Checkpointer(checkpoints, model, parallel, tokenizer=tokenizer, config_yaml=text, keep=2) as checkpointer:
        ...
        checkpointer.save(step, optimizer=optimizer, trainer=trainer.state_dict())

`save` copies the state into host memory, which is all that training waits for. A thread of every rank then writes its
part (torch.distributed.checkpoint), and when all have done so, rank 0 adds the transformers folder and commits.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from nsa.hf import NSAForCausalLM
from nsa.runs.checkpoints import (
    READ_BYTES,
    RUN_CONFIG,
    STATE,
    TABLES,
    TRAINER,
    FileSum,
    commit,
    prune,
    random_file,
    remove_parts,
    step_folder,
    temporary_folder,
)
from nsa.runs.errors import CheckpointError
from nsa.runs.folder import sync, write_json, write_text
from nsa.train.checkpoint.read import PlainPlanner, PlainReader
from nsa.train.checkpoint.rng import random_state
from nsa.train.parallel import Parallel
from nsa.units import GIB

WRITE_TIMEOUT = timedelta(hours=1)  # ranks wait for the slowest writer; a lost rank is noticed at once
MODEL, OPTIMIZER = "model", "optimizer"  # the two parts of the tensors' state


class SaveableTokenizer(Protocol):
    """A tokenizer of `nsa.data`."""

    def save(self, folder: Path) -> None: ...


class Checkpointer:
    """Writes the checkpoints of one run; on every rank, at the same steps. A context manager.

    Leaving it waits for the checkpoint in flight, also when training failed.

    Args:
        checkpoints: the run's folder of checkpoints, on a disk that all ranks share; made when missing.
        model: the run's model, without a wrapper around it.
        parallel: this process among those of the run.
        tokenizer: written beside the model.
        config_yaml: the run's config, written beside it too.
        keep: newest checkpoints that stay.
        keep_every_steps: checkpoints of multiples of this step stay too; 0 for none.
        tables: files that only grow; what is in them at `save` is copied into the checkpoint.
        saved_step: step of the checkpoint that the run resumes from; 0 for none.

    Attributes:
        saved_step: step of the newest checkpoint, written or in flight; 0 before the first.
    """

    def __init__(
        self,
        checkpoints: Path,
        model: NSAForCausalLM,
        parallel: Parallel,
        *,
        tokenizer: SaveableTokenizer,
        config_yaml: str,
        keep: int,
        keep_every_steps: int = 0,
        tables: Sequence[Path] = (),
        saved_step: int = 0,
    ) -> None:
        self.checkpoints, self.model, self.parallel, self.tokenizer = checkpoints, model, parallel, tokenizer
        self.config_yaml, self.keep, self.keep_every_steps = config_yaml, keep, keep_every_steps
        self.tables, self.saved_step = tables, saved_step
        # Warnings are settings of the process, and DCP's come from its threads: they are silent until the end.
        self._silent = ExitStack()
        # From a GPU into pinned memory, which is kept for the next checkpoint.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=parallel.device.type == "cuda")
        self._group = _group(parallel)
        self._in_flight: Future[Metadata] | None = None
        with torch.device("meta"):
            self._skeleton = NSAForCausalLM(copy.deepcopy(model.config))
        if parallel.is_main:
            remove_parts(checkpoints)
        parallel.barrier()

    def save(self, step: int, *, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]) -> None:
        """Copy the state of `step` and begin to write it; waits for the checkpoint before it, if that is in flight.

        Args:
            step: optimizer steps done.
            optimizer: of the model.
            trainer: plain values, the same on all ranks; what they refer to may change when this returns.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        final = step_folder(self.checkpoints, step)
        position = {"step": step, **copy.deepcopy(trainer)}
        writer = _Writer(
            temporary_folder(final),
            rank=self.parallel.rank,
            random=random_state(self.parallel.device),
            publish=partial(self._publish, final, position, self._table_sizes()),
        )
        model_state, optimizer_state = training_state(self.model, optimizer)
        started = async_save(
            {MODEL: model_state, OPTIMIZER: optimizer_state},
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._stager,
        )
        assert isinstance(started, Future)
        self._in_flight, self.saved_step = started, step

    def _table_sizes(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in self.tables if path.is_file()} if self.parallel.is_main else {}

    def _publish(
        self,
        final: Path,
        position: dict[str, Any],
        table_sizes: dict[Path, int],
        metadata: Metadata,
        sums: dict[str, FileSum],
    ) -> None:
        """On rank 0, once all parts of a checkpoint are there: add the other files, and commit.

        Args:
            final: name of the checkpoint's folder.
            position: of the trainer, with its step.
            table_sizes: bytes of each table that belong to the checkpoint.
            metadata: where each tensor lies.
            sums: of the files that the ranks have written.
        """
        temporary = temporary_folder(final)
        write_json(temporary / TRAINER, position)
        write_text(temporary / RUN_CONFIG, self.config_yaml)
        self._skeleton.save_pretrained(str(temporary), state_dict=_read_weights(temporary / STATE, metadata))
        self.tokenizer.save(temporary)
        for path, size in table_sizes.items():
            _copy_beginning(path, temporary / TABLES / path.name, size)
        mode = (temporary / TRAINER).stat().st_mode  # as the umask has it; safetensors makes its file private
        for path in temporary.rglob("*"):
            name = str(path.relative_to(temporary))
            if path.is_file() and path.stat().st_mode != mode:
                path.chmod(mode)
            if path.is_file() and name not in sums:
                sync(path)
                sums[name] = FileSum.of(path)
        commit(temporary, final, sums, about={"step": position["step"], "world_size": self.parallel.world_size})
        prune(self.checkpoints, keep=self.keep, keep_every_steps=self.keep_every_steps)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in flight has failed on this rank; `wait` then says how. Never waits."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint in flight is written.

        Raises:
            CheckpointError: it could not be written; nothing of it is left, and older ones are whole.
        """
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        try:
            in_flight.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            final = step_folder(self.checkpoints, self.saved_step)
            message = f"{failure(error, self.parallel.rank)}; {_remedy(final)}"
            if self.parallel.is_main:
                shutil.rmtree(temporary_folder(final), ignore_errors=True)
            raise CheckpointError(f"the checkpoint {final} could not be written: {message}") from error

    def __enter__(self) -> Checkpointer:
        self._silent.enter_context(silent_about_no_group())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._stager.close()
            self._silent.close()


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state under the parameters' names, as the live tensors; a shared weight comes once.

    An optimizer that has not stepped yet is given its state of zeros, from which its first step is the same.
    """
    untouched = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if untouched:
        for state in optimizer.state.values():
            state["step"].zero_()
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model_state.items() if name in own}, dict(optimizer_state)


class _Writer(FileSystemWriter):
    """DCP's writer of files, with each rank's random generators and checksums, and the commit at the end."""

    def __init__(
        self,
        temporary: Path,
        *,
        rank: int,
        random: dict[str, Any],
        publish: Callable[[Metadata, dict[str, FileSum]], None],
    ) -> None:
        # Nothing is copied from a GPU any more: 0 keeps the thread away from CUDA, where it would take device 0.
        super().__init__(temporary / STATE, per_thread_copy_ahead=0)
        self.temporary, self.random_file, self.random, self.publish = temporary, random_file(rank), random, publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """On every rank: its part of the tensors and its random generators. Gives their sums to rank 0's `finish`."""
        try:
            written = super().write_data(plan, planner).wait()
        except RuntimeError as error:
            # torch.save hides what the system said behind a complaint about positions in its archive.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        torch.save(self.random, self.temporary / self.random_file)
        sync(self.temporary / self.random_file)
        names = {f"{STATE}/{result.storage_data.relative_path}" for result in written} | {self.random_file}
        sums = {name: FileSum.of(self.temporary / name) for name in names}
        future: TorchFuture[Any] = TorchFuture()
        future.set_result([*written, sums])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, when all ranks have written: the rest of the files, and the commit."""
        super().finish(metadata, [written for *written, _ in results])
        sums = {name: sums[name] for *_, sums in results for name in sums}
        self.publish(metadata, sums)


def _group(parallel: Parallel) -> dist.ProcessGroup | None:
    """A group between the hosts for the writing threads, whose messages must not mix with those of training."""
    if parallel.world_size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def silent_about_no_group() -> Iterator[None]:
    """Inside, DCP is silent about a process without a group, of which it warns at every checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _copy_beginning(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a file that goes on growing."""
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as file, target.open("xb") as copied:
        while size and (piece := file.read(min(size, READ_BYTES))):
            copied.write(piece)
            size -= len(piece)


def _read_weights(state: Path, metadata: Metadata) -> dict[str, Tensor]:
    """The whole weights from the parts of all ranks, without a word to the other ranks."""
    prefix = f"{MODEL}."
    entries = {name: entry for name, entry in metadata.state_dict_metadata.items() if name.startswith(prefix)}
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        for name, entry in entries.items()
    }
    load(weights, storage_reader=PlainReader(state), planner=PlainPlanner(), no_dist=True)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def failure(error: BaseException, rank: int) -> str:
    """The first failure and the rank that it happened on."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"rank {rank}: {type(error).__name__}: {error}"


def _remedy(final: Path) -> str:
    usage = shutil.disk_usage(final.parent if final.parent.is_dir() else final.parents[1])
    return (
        f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB are free there. Older checkpoints are whole; make "
        f"room or lower train.keep_checkpoints, then continue with: nsa resume {final.parents[1]}"
    )
