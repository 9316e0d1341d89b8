"""What the kernels ask of a device, and tensors as they take them: sizes, alignment, precision.

A tensor is "fitting" when its last size is one that the kernels are compiled for and it is contiguous and aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
VALUE_SIZES = (16, 32, 64, 128, 256)
# Sizes of keys may have a tail: a power of two is multiplied first, a smaller one after it.
KEY_SIZES = (16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256)


def fit(x: Tensor, sizes: tuple[int, ...] = VALUE_SIZES) -> Tensor:
    """`x` as the kernels take it: contiguous, 16-byte aligned, its last size padded to one of `sizes`.

    Raises:
        ValueError: the last size is beyond the largest of them.
    """
    size = x.shape[-1]
    if size > sizes[-1]:
        raise ValueError(
            f"backend 'triton' takes head sizes up to {sizes[-1]}, not {size}; use backend='torch' for this layer"
        )
    fitting = next(s for s in sizes if s >= size)
    x = (x if fitting == size else F.pad(x, (0, fitting - size))).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def key_tail(size: int) -> int:
    """What a size of KEY_SIZES has beyond its largest power of two."""
    return size - 2 ** (size.bit_length() - 1)


def dot_precision(x: Tensor) -> str:
    """fp32 input is multiplied exactly, not in tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def has_large_shared_memory(x: Tensor) -> bool:
    """Whether a program may use Hopper's 227 KiB; the other tile sizes fit 99 KiB, as every Ampere has."""
    return x.is_cuda and torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >= 232448


def scratch_of(x: Tensor, most: int) -> int:
    """`most` bytes of scratch, or a sixtieth of the device's memory where that is less, as on smaller GPUs."""
    return min(most, torch.cuda.get_device_properties(x.device).total_memory // 60) if x.is_cuda else most


def num_multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the device of `x`."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def is_hopper(x: Tensor) -> bool:
    """Whether `x` lies on an H100 or H200 or their kin: wgmma is theirs alone."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def hopper_serves(q: Tensor, v: Tensor) -> bool:
    """Whether Hopper's own kernels take these fitting tensors.

    Other head sizes, fp32 and other devices keep the plain kernels; the results differ by rounding only.
    """
    fits = (q.shape[3], v.shape[3]) in ((64, 64), (128, 128), (192, 128))
    return is_hopper(q) and q.dtype in (torch.float16, torch.bfloat16) and fits
