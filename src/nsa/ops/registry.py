"""`torch.library` operators of the stages: schemas, fakes and autograd. Imports no backend until one is called.

Each stage is one operator `nsa::<stage>` and, where it is differentiable, one operator `nsa::<stage>_backward`, both
with the backend's name as their last argument. A backend is a module with the functions `<stage>_forward` and
`<stage>_backward` of the same arguments less that name. `reference` is no backend of these operators: autograd
differentiates it directly, so that it stays independent of everything here.

Shapes are those of `nsa.ops.api`. `geometry` travels as `BlockGeometry.as_tuple()`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKEND_MODULES = {"torch": "nsa.ops.torch_native", "triton": "nsa.ops.triton"}

_library = torch.library.Library("nsa", "DEF")

_KEYS = "Tensor? cu_seqlens, int[] geometry, int q_start, float scale, str backend"
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
_SCHEMAS = {
    "mean_pool": "(Tensor x, Tensor? cu_seqlens, int[] geometry, SymInt num_compressed, str backend) -> Tensor",
    "mean_pool_backward": "(Tensor dout, Tensor? cu_seqlens, int[] geometry, SymInt length, str backend) -> Tensor",
    "compressed_attention": f"(Tensor q, Tensor k, Tensor v, {_KEYS}) -> (Tensor, Tensor)",
    "select_blocks": f"(Tensor q, Tensor k_cmp, Tensor lse, {_KEYS}) -> Tensor",
    "selected_attention": f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_KEYS}) -> (Tensor, Tensor)",
    "window_attention": "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int[] geometry, int q_start, int k_start, "
    "float scale, str backend) -> (Tensor, Tensor)",
    "compressed_attention_backward": f"({_SAVED}, {_KEYS}) -> (Tensor, Tensor, Tensor)",
    "selected_attention_backward": f"({_SAVED}, Tensor block_indices, {_KEYS}) -> (Tensor, Tensor, Tensor)",
    "window_attention_backward": f"({_SAVED}, Tensor? cu_seqlens, int[] geometry, int q_start, int k_start, "
    "float scale, str backend) -> (Tensor, Tensor, Tensor)",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor k_win, Tensor v_win, Tensor gates, "
    "Tensor? cu_seqlens, int[] geometry, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor k_win, "
    "Tensor v_win, Tensor gates, Tensor out_cmp, Tensor out_slc, Tensor out_win, Tensor lse_cmp, Tensor lse_slc, "
    "Tensor lse_win, Tensor block_indices, Tensor? cu_seqlens, int[] geometry, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "paged_decode": "(Tensor q, Tensor gates, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor block_table, "
    "Tensor lengths, Tensor? k_win, Tensor? v_win, int[] geometry, float scale, str backend) -> (Tensor, Tensor)",
}


def _backend(name: str) -> ModuleType:
    return importlib.import_module(BACKEND_MODULES[name])


def _define(name: str, schema: str) -> None:
    # Compilers must hand over inputs with the strides of eager mode: the kernels choose their layout by them.
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    function = name if name.endswith("_backward") else f"{name}_forward"

    def call(*args: Any) -> Any:
        return getattr(_backend(args[-1]), function)(*args[:-1])

    _library.impl(name, call, "CompositeExplicitAutograd")


for _name, _schema in _SCHEMAS.items():
    _define(_name, _schema)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return out, lse


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # pyright: ignore[reportReturnType]


@torch.library.register_fake("nsa::select_blocks", lib=_library)
def _select_blocks_fake(q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None, geometry: list[int], *_: Any):
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], geometry[3], dtype=torch.int32)


@torch.library.register_fake("nsa::mean_pool", lib=_library)
def _mean_pool_fake(x: Tensor, cu_seqlens: Tensor | None, geometry: list[int], num_compressed: int, backend: str):
    return x.new_empty(x.shape[0], num_compressed, x.shape[2], x.shape[3])


@torch.library.register_fake("nsa::mean_pool_backward", lib=_library)
def _mean_pool_backward_fake(
    dout: Tensor, cu_seqlens: Tensor | None, geometry: list[int], length: int, backend: str
) -> Tensor:
    return dout.new_empty(dout.shape[0], length, dout.shape[2], dout.shape[3])


def _register_attention(name: str, num_index_tensors: int) -> None:
    """Fake and autograd for a stage `(q, k, v, *index tensors, cu_seqlens, *constants) -> (out, lse)`."""
    forward_name, backward_name = f"nsa::{name}", f"nsa::{name}_backward"
    backward_op = getattr(torch.ops.nsa, f"{name}_backward")
    torch.library.register_fake(forward_name, _attention_fake, lib=_library)
    torch.library.register_fake(backward_name, _attention_backward_fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v = inputs[:3]
        ctx.save_for_backward(q, k, v, *output, *inputs[3 : 4 + num_index_tensors])
        ctx.constants = inputs[4 + num_index_tensors :]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        nones = (None,) * (1 + num_index_tensors + len(ctx.constants))
        if dout is None and dlse is None:
            return (None, None, None, *nones)
        if dout is None:
            dout = torch.zeros_like(out)
        return (*backward_op(dout, dlse, q, k, v, out, lse, *rest, *ctx.constants), *nones)

    torch.library.register_autograd(forward_name, backward, setup_context=setup_context, lib=_library)


_register_attention("compressed_attention", 0)
_register_attention("selected_attention", 1)
_register_attention("window_attention", 0)


def _mean_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.cu_seqlens, ctx.geometry, _, ctx.backend = inputs
    ctx.length = x.shape[1]


def _mean_pool_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grad = torch.ops.nsa.mean_pool_backward(dout, ctx.cu_seqlens, ctx.geometry, ctx.length, ctx.backend)
    return grad, None, None, None, None


torch.library.register_autograd("nsa::mean_pool", _mean_pool_backward, setup_context=_mean_pool_setup, lib=_library)


@torch.library.register_fake("nsa::attention", lib=_library)
def _attention_whole_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_seqlens: Tensor | None, geometry: list[int], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    outs = [q.new_empty(*q.shape[:3], v.shape[3]) for _ in range(4)]
    lses = [q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(3)]
    return *outs, *lses, q.new_empty(q.shape[0], q.shape[1], k.shape[2], geometry[3], dtype=torch.int32)


@torch.library.register_fake("nsa::attention_backward", lib=_library)
def _attention_whole_backward_fake(dout: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:8])


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cu_seqlens, geometry, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output[1:], cu_seqlens)
    ctx.constants = (geometry, scale, backend)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _attention_whole_backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    return (*torch.ops.nsa.attention_backward(dout, *ctx.saved_tensors, *ctx.constants), None, None, None, None)


torch.library.register_autograd(
    "nsa::attention", _attention_whole_backward, setup_context=_attention_setup, lib=_library
)


@torch.library.register_fake("nsa::paged_decode", lib=_library)
def _paged_decode_fake(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    geometry = rest[6]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[1], k.shape[1], geometry[3], dtype=torch.int32)
