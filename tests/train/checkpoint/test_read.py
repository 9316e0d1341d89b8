"""A checkpoint whose files ask for calls is refused by name and nothing is called, though its checksums are right."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nsa.hf import NSAForCausalLM
from nsa.runs.checkpoints import COMPLETE, FileSum, Listing, damage
from nsa.runs.errors import CheckpointError
from nsa.train.checkpoint.load import load_checkpoint
from nsa.train.checkpoint.read import ALLOWED, PlainReader
from ranks import run_ranks
from saved_runs import ONE_PROCESS, save_model
from tiny_models import tiny_config


class Hostile:
    """An object whose unpickling makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


class Model:
    """A checkpoint with its model, into which something can be planted."""

    def __init__(self, checkpoint: Path, model: NSAForCausalLM) -> None:
        self.checkpoint, self.model = checkpoint, model
        self.state, self.acted = checkpoint / "state", checkpoint.parent / "acted"

    def load(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters())
        load_checkpoint(self.checkpoint, model=self.model, optimizer=optimizer, parallel=ONE_PROCESS)

    def sum_up(self) -> None:
        """Let the listing have the checksums of what is there now."""
        listing = json.loads((self.checkpoint / COMPLETE).read_text())
        listing["files"] = {name: vars(FileSum.of(self.checkpoint / name)) for name in listing["files"]}
        (self.checkpoint / COMPLETE).write_text(json.dumps(listing))
        assert damage(self.checkpoint) is None

    def plant_metadata(self, change: Any) -> None:
        metadata = FileSystemReader(self.state).read_metadata()
        metadata = change(metadata) or metadata
        (self.state / ".metadata").write_bytes(pickle.dumps(metadata))
        self.sum_up()

    def plant_planner_data(self, value: object) -> None:
        self.plant_metadata(lambda metadata: setattr(metadata, "planner_data", value))

    def plant_bytes(self, value: object) -> None:
        """Replace the first value that is no tensor, in a part file of its own."""

        def change(metadata: Any) -> None:
            kinds = metadata.state_dict_metadata.items()
            name = next(name for name, kind in kinds if isinstance(kind, BytesStorageMetadata))
            torch.save(value, self.state / "__0_9.distcp")
            size = (self.state / "__0_9.distcp").stat().st_size
            old = metadata.storage_data[MetadataIndex(name)]
            metadata.storage_data[MetadataIndex(name)] = type(old)("__0_9.distcp", 0, size, old.transform_descriptors)

        self.plant_metadata(change)


@pytest.fixture
def saved(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config("nsa", vocab_size=259))
    return Model(save_model(tmp_path, 3, model), model)


def test_an_honest_checkpoint_loads_with_the_types_on_the_list_alone(saved: Model) -> None:
    saved.load()
    assert Listing.read(saved.checkpoint).step == 3
    assert PlainReader(saved.state).read_metadata().state_dict_metadata
    assert not {name for _, name in ALLOWED} & {"eval", "exec", "getattr", "load", "_load_from_bytes"}


def test_metadata_that_asks_for_a_call_is_refused(saved: Model) -> None:
    saved.plant_planner_data(Hostile(saved.acted))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it asks for posix\.mkdir") as caught:
        saved.load()
    assert not saved.acted.exists()
    assert "Traceback" not in str(caught.value)


def test_a_value_that_asks_for_a_call_is_refused(saved: Model) -> None:
    saved.plant_bytes(Hostile(saved.acted))
    with pytest.raises(CheckpointError, match=r"optimizer\.param_groups\.\S+ is no plain value") as caught:
        saved.load()
    assert not saved.acted.exists()
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("value", [0.5, [1, 2], (0.9, 0.95), None, "text", {"a": 1.0}])
def test_plain_values_are_read(saved: Model, value: object) -> None:
    saved.plant_bytes(value)
    saved.load()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "link.distcp"])
def test_parts_outside_the_checkpoint_are_not_read(saved: Model, name: str) -> None:
    (saved.state / "link.distcp").symlink_to("/etc/hostname")

    def change(metadata: Any) -> None:
        for index, old in metadata.storage_data.items():
            metadata.storage_data[index] = type(old)(name, old.offset, old.length, old.transform_descriptors)

    saved.plant_metadata(change)
    with pytest.raises(CheckpointError, match="which lies outside of it"):
        saved.load()


@pytest.mark.parametrize(
    "contents",
    [b"", b"\x80", b"nonsense", pickle.dumps([1]), pickle.dumps(print), b"cnsa.absent\nx\n.", b"(" * 99],
)
def test_metadata_that_is_something_else_is_named(saved: Model, contents: bytes) -> None:
    (saved.state / ".metadata").write_bytes(contents)
    saved.sum_up()
    with pytest.raises(CheckpointError, match=r"step_000003 cannot be read into this model: .*\.metadata"):
        saved.load()


HOSTILE_RANKS = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.append(given["tests"])
from nsa.data.tokenizers import ByteTokenizer
from nsa.loss import NextTokenLoss
from nsa.runs.errors import CheckpointError
from nsa.train.checkpoint.load import load_checkpoint
from nsa.train.checkpoint.save import Checkpointer
from nsa.train.parallel import distribute
from test_read import Hostile, Model
from tiny_models import tiny_config
from nsa.hf import NSAForCausalLM

said = []
with setup_parallel("cpu", timeout_s=60) as both:
    for mode in ("ddp", "fsdp2"):
        parallel, folder = replace(both, mode=mode), Path(given["folder"]) / mode
        model = NSAForCausalLM(tiny_config("nsa", vocab_size=259))
        shared = distribute(NextTokenLoss(model, compiled=False), parallel, "fp32")
        optimizer = torch.optim.AdamW(model.parameters())
        options = {"tokenizer": ByteTokenizer(), "config_yaml": "", "keep": 9}
        with Checkpointer(folder, model, parallel, **options) as checkpointer:
            checkpointer.save(3, optimizer=optimizer, trainer={})
        parallel.barrier()
        planted = Model(folder / "step_000003", model)
        load_checkpoint(planted.checkpoint, model=model, optimizer=optimizer, parallel=parallel)
        for plant in (planted.plant_bytes, planted.plant_planner_data):
            if parallel.is_main:
                plant(Hostile(folder / "acted"))
            parallel.barrier()
            try:
                load_checkpoint(planted.checkpoint, model=model, optimizer=optimizer, parallel=parallel)
            except CheckpointError as error:
                said.append(str(error))
report(said)
"""


def test_two_ranks_refuse_together_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "tests": str(Path(__file__).parent)}
    for said in run_ranks(HOSTILE_RANKS, given):
        for value, metadata in (said[:2], said[2:]):
            assert "is no plain value" in value
            assert "it asks for posix.mkdir" in metadata
    assert not list(tmp_path.glob("*/acted"))
