"""What the kernels ask of a device, and tensors as they take them: sizes, alignment, precision.

A tensor is "fitting" when its last size is one that the kernels are compiled for and it is contiguous and aligned.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
VALUE_SIZES = (16, 32, 64, 128, 256)
# Sizes of keys may have a tail: a power of two is multiplied first, a smaller one after it.
KEY_SIZES = (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256)


def fitting_size(size: int, sizes: tuple[int, ...] = VALUE_SIZES) -> int:
    """The least of `sizes` that holds `size`.

    Raises:
        ValueError: there is none.
    """
    if size > sizes[-1]:
        raise ValueError(
            f"backend 'triton' takes head sizes up to {sizes[-1]}, not {size}; use backend='torch' for this layer"
        )
    return next(s for s in sizes if s >= size)


def fit(x: Tensor, sizes: tuple[int, ...] = VALUE_SIZES) -> Tensor:
    """`x` as the kernels take it: contiguous, 16-byte aligned, its last size padded to one of `sizes`.

    Raises:
        ValueError: the last size is beyond the largest of them.
    """
    size = x.shape[-1]
    fitting = fitting_size(size, sizes)
    # Zeros change no product of queries and keys, and the columns that they add to the output are cut off.
    x = (x if fitting == size else F.pad(x, (0, fitting - size))).contiguous()
    # Loads of 16 bytes and TMA need it; a view may begin anywhere.
    return x if x.data_ptr() % 16 == 0 else x.clone()


def key_tail(size: int) -> int:
    """What a size of KEY_SIZES has beyond its largest power of two."""
    return size - 2 ** (size.bit_length() - 1)


def dot_precision(x: Tensor) -> str:
    """fp32 input is multiplied exactly, not in tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


class Device(NamedTuple):
    """What the choice of kernels asks of a device.

    Attributes:
        capability: compute capability; (0, 0) is the CPU, where kernels are interpreted.
        shared_memory: bytes that a program may have.
        num_multiprocessors: of the device.
        total_memory: bytes.
    """

    capability: tuple[int, int]
    shared_memory: int
    num_multiprocessors: int
    total_memory: int

    @property
    def is_hopper(self) -> bool:
        """An H100 or H200 or their kin: wgmma is theirs alone."""
        return self.capability == (9, 0)

    @property
    def has_large_shared_memory(self) -> bool:
        """Whether a program may use Hopper's 227 KiB; the other tiles fit 99 KiB, as every Ampere has."""
        return self.shared_memory >= 232448

    def scratch_bytes(self, most: int) -> int:
        """`most` bytes, or a sixtieth of the memory where that is less, as on smaller GPUs."""
        return min(most, self.total_memory // 60)


@cache
def read_device(device: torch.device) -> Device:
    """The facts of a CUDA device, read once, or the CPU's."""
    if device.type != "cuda":
        return Device((0, 0), 0, 1, 2**40)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
        properties.total_memory,
    )
