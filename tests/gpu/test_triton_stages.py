"""Every stage of the Triton backend against fp64, by the relative rule.

A kernel's error may be twice that of the same mathematics done plainly in the low precision, three times for gradients.
`plain` is that mathematics: masks from positions, products in the inputs' dtype, softmax in fp32. In fp64 it is the
oracle; in the inputs' dtype it is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import SMALL, Sizes
from gpu.planned import OTHER_CAPABILITY, plan_for, run_stage, run_whole
from nsa import BlockGeometry
from nsa.ops import reference, triton as backend
from nsa.ops.call import AttentionInputs, Call
from nsa.ops.triton.plan import Plan

PAPER = BlockGeometry()


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """A problem as large as training's."""

    geometry: BlockGeometry = PAPER
    dtype: torch.dtype = torch.bfloat16


CASES = [
    *(Case(tokens=200, heads=group, geometry=SMALL) for group in (1, 2, 3, 4, 5, 8, 12, 16, 32)),
    *(Case(tokens=150, groups=2, head_dim=size, geometry=SMALL) for size in (16, 32, 48, 80, 96, 128, 160, 256)),
    *(
        Case(batch=2, tokens=130, heads=8, groups=2, head_dim=192, value_head_dim=128, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
    ),
    *(
        Case(tokens=120, groups=2, head_dim=size, value_head_dim=64, geometry=SMALL, dtype=torch.float32)
        for size in (64, 128, 256)
    ),
    Case(tokens=700, heads=16, head_dim=128),
    Case(tokens=500, heads=16, head_dim=128, geometry=SMALL, documents=(0, 0, 1, 70, 133, 133, 140, 400, 500)),
    Case(batch=2, tokens=333, heads=8, groups=2, head_dim=128),
    Case(tokens=1500, heads=64, groups=4, head_dim=128, documents=(0, 0, 31, 32, 700, 1500)),
    # More blocks than a list has, so that rows are gathered: whole and cut items, group sizes of every kind.
    Case(tokens=1500, heads=16, head_dim=128),
    Case(batch=2, tokens=1400, heads=8, groups=2, head_dim=128, dtype=torch.float16),
    Case(tokens=1500, heads=16, head_dim=192, value_head_dim=128),
    Case(tokens=1600, head_dim=192, value_head_dim=128, documents=(0, 0, 1500, 1531, 1600)),
    Case(tokens=2000, heads=6),
    Case(tokens=2400, heads=3, documents=(0, 0, 1400, 1431, 2400)),
    Case(tokens=1200, heads=32),
    Case(tokens=1500, head_dim=128, geometry=BlockGeometry(32, 16, 64, 8, 0, 3, 100)),
    Case(tokens=1300, heads=2, groups=2, head_dim=128),
    Case(tokens=1300, heads=2, groups=2, head_dim=192, value_head_dim=128),
    Case(tokens=77, heads=16, head_dim=128, q_start=900, k_start=300, dtype=torch.float16),
    Case(tokens=300, heads=8, groups=2, documents=(0, 100, 131, 300), dtype=torch.float32),
    Case(tokens=90, heads=8, groups=2, geometry=SMALL, q_start=133, k_start=100, dtype=torch.float16),
    Case(tokens=700, head_dim=32, geometry=BlockGeometry(32, 16, 256, 3, 1, 1, 100)),
    Case(tokens=400, heads=5, head_dim=80, geometry=BlockGeometry(12, 4, 24, 5, 0, 2, 33)),
    Case(
        tokens=600, heads=8, groups=2, head_dim=128, value_head_dim=64, geometry=BlockGeometry(64, 8, 64, 8, 1, 1, 128)
    ),
    Case(tokens=1, groups=2, geometry=SMALL),
    Case(batch=3, tokens=31),
]


class Problem:
    """Random inputs of a case, on the GPU."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        B, T, H, Hkv, Dk, Dv = case.batch, case.tokens, case.heads, case.groups, case.head_dim, case.value_size
        S, N, geometry = case.num_keys, case.num_compressed, case.geometry
        self.cu = case.cu_seqlens("cuda")
        self.geometry, self.dtype, self.q_start, self.k_start = geometry, case.dtype, case.q_start, case.k_start
        self.scale = Dk**-0.5
        self.call = Call(geometry, self.scale, self.cu, case.q_start, case.k_start)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").to(case.dtype)

        self.q, self.k, self.v = draw(B, T, H, Dk), draw(B, S, Hkv, Dk), draw(B, S, Hkv, Dv)
        self.k_cmp, self.v_cmp = draw(B, N, Hkv, Dk), draw(B, N, Hkv, Dv)
        self.dout = draw(B, T, H, Dv)
        self.dlse = torch.randn(B, T, H, device="cuda")
        # Of each query and key: document and position; of each compressed key: document and last position.
        lengths = case.lengths
        self.doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).cuda()
        self.position = torch.cat([torch.arange(n) for n in lengths]).cuda()
        counts = [geometry.num_compressed(n) for n in lengths]
        self.cmp_doc = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)]).cuda()
        last = [torch.arange(n) * geometry.compress_stride + geometry.compress_block_size - 1 for n in counts]
        self.cmp_last = torch.cat(last).cuda()

    def mask(self, stage: str, blocks: Tensor | None = None) -> Tensor:
        """Which keys each query sees, `[B or 1, T, Hkv or 1, 1, S]`."""
        doc, t = self.doc[self.q_start :, None], self.position[self.q_start :, None]
        if stage == "compressed":
            seen = (self.cmp_doc == doc) & (self.cmp_last <= t)
        else:
            seen = (self.doc == doc) & (self.position <= t)
            if stage == "window":
                seen = (seen & (self.position > t - self.geometry.window_size))[:, self.k_start :]
        seen = seen[None, :, None, None, :]
        if blocks is not None:
            own = self.position // self.geometry.select_block_size
            seen = seen & (blocks[..., None] == own).any(3)[:, :, :, None, :]
        return seen


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    statistics = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("btkrd,bskd->btkrs", q.unflatten(2, (k.shape[2], -1)), k).to(statistics) * scale
    some = seen.any(-1)
    scores = torch.where(seen, scores, torch.where(some[..., None], -torch.inf, 0.0))
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    p = torch.exp(scores - lse[..., None]) * some[..., None]
    out = torch.einsum("btkrs,bskd->btkrd", p.to(v.dtype), v)
    return out.flatten(2, 3), torch.where(some, lse, -torch.inf).flatten(2, 3)


def error(x: Tensor, exact: Tensor) -> float:
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(x), finite)
    return float((x.double() - exact)[finite].detach().norm())


def results(run, inputs: tuple[Tensor, ...], case: Problem) -> list[Tensor]:
    inputs = tuple(x.requires_grad_() for x in inputs)
    out, lse = run(*inputs)
    finite = torch.where(torch.isfinite(lse), lse, 0.0)
    loss = (out * case.dout.to(out.dtype)).sum() + (finite * case.dlse.to(finite.dtype)).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))]


def check(stage: str, case: Problem, inputs: tuple[Tensor, ...], run, blocks: Tensor | None = None) -> None:
    seen = case.mask(stage, blocks)
    exact = results(lambda *x: plain(*x, seen, case.scale), tuple(x.double() for x in inputs), case)
    low = results(lambda *x: plain(*x, seen, case.scale), tuple(x.clone() for x in inputs), case)
    mine = results(run, tuple(x.clone() for x in inputs), case)
    for name, x, y, z, times in zip(("out", "lse", "dq", "dk", "dv"), mine, low, exact, (2, 2, 3, 3, 3), strict=True):
        # The log-sum-exp of a kernel is fp32 whatever the inputs; a few roundings of it are no error.
        floor = 1e-6 * float(z[torch.isfinite(z)].detach().norm()) + 1e-12
        assert error(x, z) <= times * error(y, z) + floor, (stage, name, error(x, z), error(y, z))


def run_operator(name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, call = arguments
    return getattr(torch.ops.nsa, name)(*tensors, *call.flatten(), "triton")


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_every_stage_is_as_exact_as_plain_mathematics(sizes):
    check_stages(Problem(sizes), run_operator)


def check_stages(case: Problem, run: Callable[..., tuple[Tensor, Tensor]], plan: Plan | None = None) -> None:
    """Compare each stage as `run` runs it by name; `plan` is for what else runs."""
    compressed, call = (case.q, case.k_cmp, case.v_cmp), case.call
    check("compressed", case, compressed, lambda *x: run("compressed_attention", *x, call))
    window = (case.q, case.k[:, case.k_start :].contiguous(), case.v[:, case.k_start :].contiguous())
    check("window", case, window, lambda *x: run("window_attention", *x, call))
    _, lse = backend.compressed_attention_forward(*compressed, call, plan=plan)
    blocks = backend.select_blocks_forward(case.q, case.k_cmp, lse, call, plan=plan)
    keys = (case.q, case.k, case.v)
    check("selected", case, keys, lambda *x: run("selected_attention", *x, blocks, call), blocks)


@pytest.mark.parametrize("unions", [False, True])
@pytest.mark.parametrize("sizes", [x for x in CASES if x.q_start == 0], ids=str)
def test_the_whole_operator_is_as_exact_as_plain_mathematics(sizes, unions):
    case = Problem(sizes)
    scale = case.scale
    gates = torch.randn(*case.q.shape[:3], 3, device="cuda").to(case.dtype)
    k_win, v_win = torch.randn_like(case.k), torch.randn_like(case.v)
    inputs = (case.q, case.k, case.v, case.k_cmp, case.v_cmp, k_win, v_win, gates)
    plan = plan_for(case.q, case.k_cmp, case.v, case.geometry, case.cu, unions=unions)
    blocks = backend.attention_forward(AttentionInputs(*inputs), case.call, plan=plan)[1].block_indices
    seen = [case.mask("compressed"), case.mask("selected", blocks), case.mask("window")]

    def by_stages(q, k, v, k_cmp, v_cmp, k_win, v_win, gates):
        pairs = ((k_cmp, v_cmp), (k, v), (k_win, v_win))
        return sum(gates[..., i, None] * plain(q, *pairs[i], seen[i], scale)[0] for i in range(3))

    def run(function, dtype):
        x = tuple(y.to(dtype, copy=True).requires_grad_() for y in inputs)
        out = function(*x)
        grads = torch.autograd.grad(out, x, case.dout.to(dtype), allow_unused=True, materialize_grads=True)
        return out, *grads

    exact, low = run(by_stages, torch.float64), run(by_stages, case.dtype)
    mine = run(lambda *x: run_whole(plan, x, case.call), case.dtype)
    names = ("out", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dk_win", "dv_win", "dgates")
    for name, x, y, z in zip(names, mine, low, exact, strict=True):
        # Where exact gradients are zero (one key), rounding leaves what it leaves of the terms that cancel.
        floor = 1e-6 * (float(z.detach().norm()) + float(case.dout.norm()))
        times = 2 if name == "out" else 3
        assert error(x, z) <= times * error(y, z) + floor, (name, error(x, z), error(y, z))


@pytest.mark.parametrize("sizes", [x for x in CASES if x.head_dim in (64, 128) and x.documents], ids=str)
def test_what_other_devices_run_is_as_exact_on_hopper(sizes):
    case = Problem(sizes)
    plan = plan_for(case.q, case.k_cmp, case.v, case.geometry, case.cu, case.q_start, capability=OTHER_CAPABILITY)
    check_stages(case, partial(run_stage, plan), plan)


@pytest.mark.parametrize("sizes", [x for x in CASES if x.tokens <= 300], ids=str)
def test_the_chosen_blocks_are_the_references_where_scores_do_not_tie(sizes):
    case = Problem(sizes)
    _, lse = backend.compressed_attention_forward(case.q, case.k_cmp, case.v_cmp, case.call)
    blocks = backend.select_blocks_forward(case.q, case.k_cmp, lse, case.call)
    expected = reference.select_blocks(case.q, case.k_cmp, lse, case.geometry, case.cu, case.q_start, case.scale)
    # Random scores tie within rounding about once in a few thousand rows.
    assert (blocks != expected).any(-1).sum() <= 1 + blocks[..., 0].numel() // 1000
    assert torch.equal((blocks >= 0).sum(-1), (expected >= 0).sum(-1))


def test_equal_scores_go_to_the_lower_blocks():
    geometry = BlockGeometry(32, 16, 64, 6, 1, 2, 64)
    q = torch.ones(1, 4096, 16, 64, device="cuda", dtype=torch.bfloat16)
    k_cmp = torch.ones(1, geometry.num_compressed(4096), 1, 64, device="cuda", dtype=torch.bfloat16)
    call = Call(geometry, 0.125)
    _, lse = backend.compressed_attention_forward(q, k_cmp, k_cmp, call)
    blocks = backend.select_blocks_forward(q, k_cmp, lse, call)
    # Inner blocks all have the same importance; block 0 is forced, so 1, 2, 3 join it and the two local ones.
    assert blocks[0, 4095, 0].tolist() == [0, 1, 2, 3, 62, 63]
