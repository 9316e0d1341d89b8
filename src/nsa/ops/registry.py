"""`torch.library` operators of the stages: schemas, fakes, autograd, and what a backend must have.

Each stage is one operator `nsa::<stage>` and, where it is differentiable, one operator `nsa::<stage>_backward`, both
with the backend's name as their last argument. A backend is a module with the functions of `Backend`; `FusedBackend`
and `StepBackend` add those that are optional, and `nsa.ops.routing` says which backends have them. None is imported
until one of its functions is called. `reference` is no backend of these operators: autograd differentiates it directly,
so that it stays independent of everything here.

Operators take flat arguments (`nsa.ops.call`); backends take a `Call`. Shapes are those of `nsa.ops.api`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.cache_view import CacheView, PagedView
from nsa.ops.call import CALL_SCHEMA, AttentionInputs, BranchResults, Call

BACKEND_MODULES = {"torch": "nsa.ops.torch_native", "triton": "nsa.ops.triton"}

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class Backend(Protocol):
    """What every backend computes: each function is the operator of that name less the backend's own."""

    def mean_pool_forward(
        self, x: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, num_compressed: int, /
    ) -> Tensor: ...

    def mean_pool_backward(
        self, dout: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, length: int, /
    ) -> Tensor: ...

    def compressed_attention_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, /) -> Pair: ...

    def compressed_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        call: Call, /,
    ) -> Triple: ...  # fmt: skip

    def select_blocks_forward(self, q: Tensor, k_cmp: Tensor, lse: Tensor, call: Call, /) -> Tensor: ...

    def selected_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, call: Call, /
    ) -> Pair: ...

    def selected_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        block_indices: Tensor, call: Call, /,
    ) -> Triple: ...  # fmt: skip

    def window_attention_forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, /) -> Pair: ...

    def window_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        call: Call, /,
    ) -> Triple: ...  # fmt: skip

    def paged_decode_forward(
        self, q: Tensor, gates: Tensor, view: PagedView, geometry: BlockGeometry, scale: float, /
    ) -> Pair: ...


class FusedBackend(Backend, Protocol):
    """A backend that computes a whole call at once, `nsa::attention`; calls go to the others stage by stage."""

    def attention_forward(self, inputs: AttentionInputs, call: Call, /) -> tuple[Tensor, BranchResults]: ...

    def attention_backward(
        self, dout: Tensor, inputs: AttentionInputs, branches: BranchResults, call: Call, /
    ) -> tuple[Tensor, ...]:
        """Gradients in the order of `inputs`."""
        ...


class StepBackend(Backend, Protocol):
    """A backend that decodes single tokens at once; the others do it as a chunk of one, stage by stage.

    An operator between would cost time alone: nothing is kept for a backward, and lengths that the host knows would
    make a compiler start anew at each token.
    """

    def decode_step(self, q: Tensor, view: CacheView, call: Call, /) -> tuple[Triple, Tensor]:
        """The branches' outputs `[B, 1, H, Dv]` and the chosen blocks `[B, 1, Hkv, n]`."""
        ...


if TYPE_CHECKING:
    from nsa.ops import torch_native, triton

    _torch: StepBackend = torch_native
    _triton: FusedBackend = triton


def load_backend(name: str) -> Backend:
    """The module of a backend of these operators."""
    return cast(Backend, importlib.import_module(BACKEND_MODULES[name]))


_library = torch.library.Library("nsa", "DEF")

_CALL = f"{CALL_SCHEMA}, str backend"
_SAVED = "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
_STAGES = {
    "compressed_attention": f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    "select_blocks": f"(Tensor q, Tensor k_cmp, Tensor lse, {_CALL}) -> Tensor",
    "selected_attention": f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_CALL}) -> (Tensor, Tensor)",
    "window_attention": f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    "compressed_attention_backward": f"({_SAVED}, {_CALL}) -> (Tensor, Tensor, Tensor)",
    "selected_attention_backward": f"({_SAVED}, Tensor block_indices, {_CALL}) -> (Tensor, Tensor, Tensor)",
    "window_attention_backward": f"({_SAVED}, {_CALL}) -> (Tensor, Tensor, Tensor)",
}
_POOLS = {
    "mean_pool": "(Tensor x, Tensor? cu_seqlens, int[] geometry, SymInt num_compressed, str backend) -> Tensor",
    "mean_pool_backward": "(Tensor dout, Tensor? cu_seqlens, int[] geometry, SymInt length, str backend) -> Tensor",
}
_INPUTS = ", ".join(f"Tensor {name}" for name in AttentionInputs._fields)
_BRANCHES = ", ".join(f"Tensor {name}" for name in BranchResults._fields)
_EIGHT = f"({', '.join(['Tensor'] * 8)})"


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Call, str]:
    """An operator's tensors, its `Call` and the backend's name."""
    *others, cu_seqlens, geometry, q_start, k_start, scale, backend = arguments
    return tuple(others), Call.unflatten(cu_seqlens, geometry, q_start, k_start, scale), backend


def _function_name(name: str) -> str:
    return name if name.endswith("_backward") else f"{name}_forward"


def _define(name: str, schema: str, run: Callable[..., Any]) -> None:
    # Compilers must hand over inputs with the strides of eager mode: the kernels choose their layout by them.
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, run, "CompositeExplicitAutograd")


def _run_stage(name: str, *arguments: Any) -> Any:
    tensors, call, backend = _split(arguments)
    return getattr(load_backend(backend), _function_name(name))(*tensors, call)


def _run_pool(name: str, x: Tensor, cu_seqlens: Tensor | None, geometry: list[int], size: int, backend: str) -> Tensor:
    return getattr(load_backend(backend), _function_name(name))(x, cu_seqlens, BlockGeometry(*geometry), size)


def _run_attention(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, call, backend = _split(arguments)
    out, branches = cast(FusedBackend, load_backend(backend)).attention_forward(AttentionInputs(*tensors), call)
    return out, *branches


def _run_attention_backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, call, backend = _split(arguments)
    num_inputs = len(AttentionInputs._fields)
    inputs, branches = AttentionInputs(*tensors[:num_inputs]), BranchResults(*tensors[num_inputs:])
    return cast(FusedBackend, load_backend(backend)).attention_backward(dout, inputs, branches, call)


def _run_paged_decode(q: Tensor, gates: Tensor, *arguments: Any) -> Pair:
    *view, geometry, scale, backend = arguments
    return load_backend(backend).paged_decode_forward(q, gates, PagedView(*view), BlockGeometry(*geometry), scale)


for _name, _schema in _STAGES.items():
    _define(_name, _schema, partial(_run_stage, _name))
for _name, _schema in _POOLS.items():
    _define(_name, _schema, partial(_run_pool, _name))
_define("attention", f"({_INPUTS}, {_CALL}) -> {_EIGHT}", _run_attention)
_define("attention_backward", f"(Tensor dout, {_INPUTS}, {_BRANCHES}, {_CALL}) -> {_EIGHT}", _run_attention_backward)
_define(
    "paged_decode",
    "(Tensor q, Tensor gates, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor block_table, Tensor lengths, "
    "Tensor? k_win, Tensor? v_win, int[] geometry, float scale, str backend) -> (Tensor, Tensor)",
    _run_paged_decode,
)


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Pair:
    return q.new_empty(*q.shape[:3], v.shape[3]), _new_lse(q)


def _attention_backward_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Triple:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _new_blocks(q: Tensor, num_groups: int, geometry: BlockGeometry) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], num_groups, geometry.num_selected_blocks, dtype=torch.int32)


@torch.library.register_fake("nsa::select_blocks", lib=_library)
def _select_blocks_fake(*arguments: Any) -> Tensor:
    (q, k_cmp, _), call, _ = _split(arguments)
    return _new_blocks(q, k_cmp.shape[2], call.geometry)


@torch.library.register_fake("nsa::mean_pool", lib=_library)
def _mean_pool_fake(x: Tensor, cu_seqlens: Tensor | None, geometry: list[int], num_compressed: int, backend: str):
    return x.new_empty(x.shape[0], num_compressed, x.shape[2], x.shape[3])


@torch.library.register_fake("nsa::mean_pool_backward", lib=_library)
def _mean_pool_backward_fake(
    dout: Tensor, cu_seqlens: Tensor | None, geometry: list[int], length: int, backend: str
) -> Tensor:
    return dout.new_empty(dout.shape[0], length, dout.shape[2], dout.shape[3])


def _register_stage(name: str, num_index_tensors: int) -> None:
    """Fake and autograd for a stage `(q, k, v, *index tensors, cu_seqlens, *constants) -> (out, lse)`."""
    forward_name, backward_name = f"nsa::{name}", f"nsa::{name}_backward"
    backward_op = getattr(torch.ops.nsa, f"{name}_backward")
    torch.library.register_fake(forward_name, _attention_fake, lib=_library)
    torch.library.register_fake(backward_name, _attention_backward_fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
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


_register_stage("compressed_attention", 0)
_register_stage("selected_attention", 1)
_register_stage("window_attention", 0)


def _mean_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.cu_seqlens, ctx.geometry, _, ctx.backend = inputs
    ctx.length = x.shape[1]


def _mean_pool_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grad = torch.ops.nsa.mean_pool_backward(dout, ctx.cu_seqlens, ctx.geometry, ctx.length, ctx.backend)
    return grad, None, None, None, None


torch.library.register_autograd("nsa::mean_pool", _mean_pool_backward, setup_context=_mean_pool_setup, lib=_library)


@torch.library.register_fake("nsa::attention", lib=_library)
def _fused_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, call, _ = _split(arguments)
    q, _, v, *_ = tensors
    outs = [q.new_empty(*q.shape[:3], v.shape[3]) for _ in range(4)]
    return *outs, *(_new_lse(q) for _ in range(3)), _new_blocks(q, v.shape[2], call.geometry)


@torch.library.register_fake("nsa::attention_backward", lib=_library)
def _fused_backward_fake(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[: len(AttentionInputs._fields)])


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    num_inputs, (_, *branches) = len(AttentionInputs._fields), output
    ctx.save_for_backward(*inputs[:num_inputs], *branches, inputs[num_inputs])
    ctx.constants = inputs[num_inputs + 1 :]
    ctx.mark_non_differentiable(*branches)
    ctx.set_materialize_grads(False)


def _fused_backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nones = (None,) * (1 + len(ctx.constants))
    if dout is None:
        return (*(None for _ in AttentionInputs._fields), *nones)
    return (*torch.ops.nsa.attention_backward(dout, *ctx.saved_tensors, *ctx.constants), *nones)


torch.library.register_autograd("nsa::attention", _fused_backward, setup_context=_fused_setup, lib=_library)


@torch.library.register_fake("nsa::paged_decode", lib=_library)
def _paged_decode_fake(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Pair:
    *_, geometry, _, _ = rest
    return q.new_empty(*q.shape[:3], v.shape[3]), _new_blocks(q, k.shape[1], BlockGeometry(*geometry))
