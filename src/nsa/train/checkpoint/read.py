"""Reading PyTorch's distributed checkpoints without running what somebody may have put into them.

    load(state, storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=True)

DCP keeps two things as pickles, which can name any function to call: `.metadata`, which says where each tensor lies,
and values that are no tensors, such as an optimizer's settings. Here the first may name the types in `ALLOWED` alone,
and the second are read as torch's weights are, tensors and plain values.
"""

from __future__ import annotations

import io
import pickle
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from nsa.runs.checkpoints import inside

DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
ALLOWED = frozenset(
    {
        *(("torch", name) for name in {"Size", *DTYPES}),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)
"""Module and name of everything that `.metadata` holds; each only keeps values."""

PATHS = frozenset({("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath")})
METADATA = ".metadata"
UNREADABLE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What unpickling raises for bytes that are no pickle, or one of something else."""


class PlainReader(FileSystemReader):
    """DCP's reader of files, which takes no other types than DCP's own and reads no file outside its folder.

    Args:
        folder: that holds `.metadata`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where each tensor lies.

        Raises:
            ValueError: `.metadata` is damaged, or holds what no checkpoint of ours does.
        """
        path = self.folder / METADATA
        try:
            with path.open("rb") as file:
                metadata = _PlainUnpickler(file).load()
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(f"{path} holds {type(metadata).__name__} and no description of a checkpoint")
        for stored in metadata.storage_data.values():
            inside(self.folder, stored.relative_path)
            if stored.transform_descriptors:
                raise ValueError(f"{path} names transforms for {stored.relative_path}; a run writes none")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """DCP's planner, which takes tensors and plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into its place.

        Raises:
            ValueError: it holds another type.
        """
        name = read_item.storage_index.fqn
        try:
            plain = torch.load(value, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{name} is no plain value, and is not read") from error
        checked = io.BytesIO()
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return PurePosixPath  # of where it was written, which nobody reads
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint")
        return getattr(import_module(module), name)
