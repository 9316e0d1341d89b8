"""The processes of one run: which one this is, what they agree on, and how they end together.

    torchrun --nproc-per-node 2 -m nsa.cli train CONFIG     # RANK, LOCAL_RANK, WORLD_SIZE come from torchrun
    nsa train CONFIG                                         # one process, no group, every method below is free

    with setup_parallel("auto") as parallel:
        if parallel.any(stop_asked_here):                    # the same answer on all ranks
            ...

Small decisions travel between the hosts (gloo), gradients and weights between the devices (NCCL on CUDA), so that
agreeing on something never waits for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch._dynamo.config as dynamo_config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nsa.device import choose_device
from nsa.loss import NextTokenLoss

Mode = Literal["none", "ddp", "fsdp2"]
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """One process among those of a run.

    Attributes:
        rank: 0 for the first of all processes.
        local_rank: 0 for the first on this host.
        world_size: processes in all.
        device: where this one computes.
        mode: "none" for one process; else how weights and gradients are shared.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mode: Mode

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints, draws and writes the run folder's shared files."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says True; the same answer on all ranks."""
        if self.world_size == 1:
            return flag
        agreed = torch.tensor([int(flag)])
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return bool(agreed.item())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over the ranks, on its device; `values` itself stays as it is."""
        if self.world_size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: T) -> T:
        """Rank 0's value, which must be picklable, on all ranks."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)


def on_main(parallel: Parallel, action: Callable[[], T]) -> T:
    """Rank 0's result of `action` on all ranks; a `ValueError` or `OSError` of rank 0 is raised on all of them."""
    result, error = None, None
    if parallel.is_main:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    result, error = parallel.broadcast((result, error))
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def one_process(device: str = "auto") -> Parallel:
    """A run of this process alone, which takes the device.

    Raises:
        ValueError: the device is not here.
    """
    return Parallel(0, 0, 1, _take(choose_device(device)), "none")


@contextmanager
def setup_parallel(device: str = "auto", mode: str = "auto", *, timeout_s: float = 600.0) -> Iterator[Parallel]:
    """Join the processes that torchrun started, or be the only one; leave the group at the end.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; with several processes each takes the GPU of its local rank.
        mode: "auto" is "ddp" for several processes; a single process needs no group, whatever the mode.
        timeout_s: a collective that lasts longer fails, so that a lost rank ends the run instead of hanging it.

    Raises:
        ValueError: the device is not here, or the mode does not fit several processes.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size == 1:
        yield one_process(device)
        return
    chosen = _mode(mode, world_size)
    target = _take(_device_of_rank(device, local_rank))
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    parallel = Parallel(rank, local_rank, world_size, target, chosen)
    try:
        # DDP would cut compiled graphs where its buckets end; layers that are compiled one by one are pieces enough for
        # its exchange to run beside backward.
        with dynamo_config.patch(optimize_ddp=False):
            yield parallel
    except BaseException as error:
        # The group is left as it is: leaving it in order would wait for ranks that wait for this one.
        error.add_note(f"this was rank {rank} of {world_size} (pid {os.getpid()}) on {target}")
        raise
    parallel.barrier()
    dist.destroy_process_group()


def _mode(mode: str, world_size: int) -> Mode:
    if mode not in ("auto", "ddp", "fsdp2"):
        raise ValueError(
            f"train.parallel is {mode!r} but torchrun started {world_size} processes; use auto, ddp or fsdp2, or one "
            f"process"
        )
    return "fsdp2" if mode == "fsdp2" else "ddp"


def _device_of_rank(name: str, local_rank: int) -> torch.device:
    """The GPU of a local rank, or the CPU.

    Raises:
        ValueError: a single GPU was named, or there is none for this rank.
    """
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if ":" in name:
        raise ValueError(f"run.device {name!r} is one GPU for several processes; use cuda: each rank takes its own")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} CUDA devices are here; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()}, or use run.device cpu"
        )
    return torch.device("cuda", local_rank)


def _take(device: torch.device) -> torch.device:
    """Make this device the one of CUDA calls that name none, so that nothing of this process lands on another GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def distribute(loss: NextTokenLoss, parallel: Parallel, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """The module whose calls make gradients, with weights or gradients shared as `parallel.mode` says.

    DDP: a wrapper; every rank keeps all weights. FSDP2: `loss` itself, whose weights become shards of fp32 weights;
    they are gathered a decoder layer at a time in the precision's dtype, what is outside the layers in fp32. Both give
    the mean of the ranks' gradients.

    Args:
        loss: on the device, alike on all ranks, its layers already compiled where they are to be.
    """
    if parallel.mode == "none":
        return loss
    if parallel.mode == "ddp":
        devices = [parallel.device] if parallel.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)
    low = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Embeddings, where the residual stream begins, and their gradients, sums over tokens, stay fp32.
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    model, mesh = cast(Any, loss.model), init_device_mesh(parallel.device.type, (parallel.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(loss, mesh=mesh, mp_policy=whole)  # pyright: ignore[reportReturnType]


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Forward and backward inside exchange gradients between the ranks, or only add them up on each."""
    if isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    yield


def release_gathered(module: nn.Module) -> None:
    """Give back the weights that FSDP2 keeps gathered after a forward without backward."""
    if isinstance(module, FSDPModule):
        module.reshard()
