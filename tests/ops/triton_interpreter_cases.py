"""Problems for every Triton kernel, and their comparison with the reference, to be run in Triton's interpreter.

`compare` and `choose_given` belong into a process of their own (`in_interpreter`).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import triton
from torch import Tensor

from attention_cases import Sizes
from nsa.geometry import BlockGeometry
from nsa.ops import reference, triton as backend
from nsa.ops.call import AttentionInputs, Call
from nsa.ops.triton.gpu import read_device
from nsa.ops.triton.plan import Plan, Shapes, make_plan
from nsa.ops.triton.tiles import choice_tile
from nsa.ops.triton.topk import choice as choices

NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates")
WIDE = BlockGeometry(8, 4, 16, 4, 1, 2, 60)
LONG = BlockGeometry(16, 16, 144, 2, 0, 1, 9)

ALL = frozenset({"pool", "compressed", "window", "selected", "whole", "unions"})


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """A problem for the kernels.

    Args:
        stages: "pool", "compressed", "window", "selected", "choice" (of blocks, by few at a time), "whole" (the
            operator) and "unions" (the operator with the selected branch by unions).
        equal_scores: all blocks are as good as each other.
        small_scratch: the selected branch works on few tokens at a time.
    """

    heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    stages: Set[str]
    equal_scores: bool = False
    small_scratch: bool = False


CASES = {
    "three heads a group, batch of two, Dk != Dv": Case(batch=2, tokens=41, heads=3, value_head_dim=32, stages=ALL),
    "packed, empty and short documents": Case(
        tokens=52, heads=4, groups=2, documents=(0, 0, 25, 25, 28, 52), stages=ALL,
    ),
    "rows after the last document": Case(
        tokens=30, documents=(0, 19), stages={"compressed", "window", "selected", "whole"},
    ),
    "whole tiles after the last document": Case(
        tokens=150, geometry=WIDE, documents=(0, 19), stages={"compressed", "window"},
    ),
    "chunk of a prefill": Case(
        tokens=14, groups=2, q_start=37, k_start=11, stages={"compressed", "window", "selected"},
    ),
    "one token": Case(tokens=1, stages=ALL),
    "no token": Case(tokens=0, stages=ALL),
    "head size that fits no tile, fp16": Case(
        tokens=33, head_dim=20, value_head_dim=12, dtype=torch.float16,
        stages={"compressed", "window", "selected", "whole"},
    ),
    "long selection blocks in parts": Case(tokens=150, heads=1, geometry=LONG, stages={"selected", "whole", "unions"}),
    "long stencil": Case(tokens=60, heads=1, geometry=BlockGeometry(24, 4, 8, 5, 1, 1, 7), stages={"selected"}),
    "forced blocks only": Case(tokens=60, geometry=BlockGeometry(8, 4, 16, 3, 1, 2, 24), stages={"selected", "whole"}),
    "choice in many chunks": Case(
        tokens=6, heads=1, geometry=BlockGeometry(4, 2, 4, 5, 1, 2, 4), q_start=1597, stages={"choice"},
    ),
    "choice in many chunks of keys' sums": Case(
        tokens=6, heads=1, geometry=BlockGeometry(24, 4, 8, 5, 1, 1, 7), q_start=3000, stages={"choice"},
    ),
    "choice in chunks, packed": Case(tokens=20, documents=(0, 5, 20), stages={"choice"}),
    "more blocks of a token than groups of candidates": Case(
        tokens=260, heads=1, geometry=BlockGeometry(4, 2, 4, 40, 1, 2, 8), stages={"selected"},
    ),
    "equal scores": Case(tokens=100, stages={"choice"}, equal_scores=True),
    "scratch for few tokens": Case(tokens=140, heads=1, stages={"selected", "whole"}, small_scratch=True),
}  # fmt: skip


def relative_error(x: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """The error's norm over that of what is expected, or over `least` where that may be zero."""
    x, expected = x.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(x), finite):
        return float("inf")
    return float((x - expected)[finite].norm() / expected[finite].norm().clamp(min=least))


class Comparison:
    """Inputs of one case and the errors of each of its stages."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        B, T, H, Hkv, Dk, Dv = case.batch, case.tokens, case.heads, case.groups, case.head_dim, case.value_size
        S, N = case.num_keys, case.num_compressed
        self.case, self.geometry, self.dtype = case, case.geometry, case.dtype
        self.q_start, self.k_start = case.q_start, case.k_start
        self.cu, self.used = case.cu_seqlens(), case.num_used
        self.q, self.k, self.v = self.draw(B, T, H, Dk), self.draw(B, S, Hkv, Dk), self.draw(B, S, Hkv, Dv)
        self.k_cmp, self.v_cmp = self.draw(B, N, Hkv, Dk), self.draw(B, N, Hkv, Dv)
        self.scale = Dk**-0.5
        self.errors: dict[str, float] = {}
        self.call = Call(case.geometry, self.scale, self.cu, case.q_start, case.k_start)
        num_docs = B if case.documents is None else len(case.documents) - 1
        self.shapes = Shapes(B, T, H, Hkv, Dk, Dv, self.dtype, self.geometry, num_docs, N, case.q_start)
        self.plan = self.make_plan()
        if case.equal_scores:
            self.q, self.k_cmp = torch.zeros_like(self.q), torch.zeros_like(self.k_cmp)

    def make_plan(self, unions: bool | None = None) -> Plan:
        """The plan of the case; with scratch for few tokens where it says so."""
        plan = make_plan(self.shapes, read_device(self.q.device), unions)
        if not self.case.small_scratch:
            return plan
        listed = replace(
            plan.listed,
            forward=replace(plan.listed.forward, scratch_bytes=1),
            backward=replace(plan.listed.backward, scratch_bytes=1),
        )
        selected = replace(
            plan.selected,
            forward=replace(plan.selected.forward, scratch_bytes=1),
            backward=replace(plan.selected.backward, scratch_bytes=1),
        )
        return replace(plan, listed=listed, selected=selected)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(self.dtype)

    def attention(self, name: str, inputs: tuple[Tensor, ...], before: tuple, after: tuple) -> Tensor:
        """Compare forward and backward; `before` and `after` are the reference's arguments around the geometry."""
        # Tokens after the last document are no part of the reference's input; compressed keys always belong to one.
        lengths = [self.used if self.cu is not None and x.shape[1] == self.q.shape[1] else x.shape[1] for x in inputs]
        exact = [x[:, :length].double().requires_grad_() for x, length in zip(inputs, lengths, strict=True)]
        cut = [x[:, : self.used] for x in before]
        expected = getattr(reference, name)(*exact, *cut, self.geometry, self.cu, *after)
        out, lse = getattr(backend, f"{name}_forward")(*inputs, *before, self.call, plan=self.plan)
        outside = [out[:, self.used :].abs().sum(), torch.isfinite(lse[:, self.used :]).sum()]
        self.errors[name] = max(relative_error(x[:, : self.used], y) for x, y in zip((out, lse), expected, strict=True))
        dout, dlse = self.draw(*out.shape), torch.randn(lse.shape)
        dlse = torch.where(torch.isfinite(lse), dlse, 0.0)
        # The gradients of rows outside any document must not leak into the keys.
        arguments = (dout, dlse, *inputs, out, lse, *before, self.call)
        grads = getattr(backend, f"{name}_backward")(*arguments, plan=self.plan)
        finite = torch.where(torch.isfinite(expected[1]), expected[1], 0.0)
        loss = (expected[0] * dout[:, : self.used].double()).sum() + (finite * dlse[:, : self.used].double()).sum()
        wanted = torch.autograd.grad(loss, exact, allow_unused=True) if loss.requires_grad else [None] * 3
        for x, y, length, label in zip(grads, wanted, lengths, ("dq", "dk", "dv"), strict=True):
            y = torch.zeros_like(x[:, :length]) if y is None else y
            self.errors[f"{name} {label}"] = relative_error(x[:, :length], y)
            outside.append(x[:, length:].abs().sum())
        self.errors[f"{name} outside"] = float(sum(outside))
        return lse

    def run(self) -> dict[str, float]:
        stages = self.case.stages
        if "pool" in stages:
            self.pool()
        if "compressed" in stages:
            self.attention("compressed_attention", (self.q, self.k_cmp, self.v_cmp), (), (self.q_start, self.scale))
        if "window" in stages:
            window = (self.q, self.k[:, self.k_start :], self.v[:, self.k_start :])
            self.attention("window_attention", window, (), (self.q_start, self.k_start, self.scale))
        if {"selected", "choice", "whole"} & stages:
            self.choice(limit="choice" in stages)
        if "selected" in stages:
            self.attention("selected_attention", (self.q, self.k, self.v), (self.blocks,), (self.q_start, self.scale))
        if "whole" in stages:
            self.whole("whole", union=False)
        if "unions" in stages:
            self.whole("union", union=True)
        return self.errors

    def pool(self) -> None:
        shape, cu = self.geometry, self.cu
        x = self.k.double().requires_grad_()
        pooled = reference.mean_pool(x, self.geometry, cu, self.k_cmp.shape[1])
        mine = backend.mean_pool_forward(self.k, cu, shape, self.k_cmp.shape[1])
        self.errors["mean_pool"] = relative_error(mine, pooled)
        dout = self.draw(*pooled.shape)
        wanted = torch.zeros_like(x)
        if pooled.requires_grad:
            wanted = torch.autograd.grad((pooled * dout.double()).sum(), x)[0]
        mine = backend.mean_pool_backward(dout, cu, shape, self.k.shape[1])
        self.errors["mean_pool dx"] = relative_error(mine, wanted)

    def whole(self, name: str, union: bool) -> None:
        """Compare the whole operator with its stages by the reference, for gates of either sign."""
        plan = self.make_plan(union)
        gates = self.draw(*self.q.shape[:3], 3)
        keys = (self.k, self.v, self.k_cmp, self.v_cmp, self.draw(*self.k.shape), self.draw(*self.v.shape))
        inputs = AttentionInputs(self.q, *keys, gates)
        lengths = [min(x.shape[1], self.used) if x.shape[1] == self.q.shape[1] else x.shape[1] for x in inputs]
        exact = [x[:, :length].double().requires_grad_() for x, length in zip(inputs, lengths, strict=True)]
        q, k, v, k_cmp, v_cmp, k_win, v_win, g = exact
        tail = (self.geometry, self.cu, 0)
        branches = (
            reference.compressed_attention(q, k_cmp, v_cmp, *tail, self.scale)[0],
            reference.selected_attention(q, k, v, self.blocks[:, : self.used], *tail, self.scale)[0],
            reference.window_attention(q, k_win, v_win, *tail, 0, self.scale)[0],
        )
        expected = sum(g[..., i, None] * branch for i, branch in enumerate(branches))
        out, saved = backend.attention_forward(inputs, self.call, plan=plan)
        self.errors[name] = relative_error(out[:, : self.used], expected)
        self.errors[f"{name} blocks"] = float((saved[-1] != self.blocks).sum())
        dout = self.draw(*out.shape)
        grads = backend.attention_backward(dout, inputs, saved, self.call, plan=plan)
        wanted = torch.autograd.grad(
            expected, exact, dout[:, : self.used].double(), allow_unused=True, materialize_grads=True
        )
        outside = [out[:, self.used :].abs().sum()]
        for tensor, x, y, length in zip(NAMES, grads, wanted, lengths, strict=True):
            self.errors[f"{name} d{tensor}"] = relative_error(x[:, :length], y, least=1.0)
            outside.append(x[:, length:].abs().sum())
        self.errors[f"{name} outside"] = float(sum(outside))

    def choice(self, limit: bool) -> None:
        """Compare the chosen blocks; with `limit`, in chunks of few candidates and of few tokens."""
        tail, plan = (self.q_start, self.scale), self.plan
        _, lse = backend.compressed_attention_forward(self.q, self.k_cmp, self.v_cmp, self.call, plan=plan)
        if limit:
            num_blocks = self.geometry.num_select_blocks(self.q_start + self.q.shape[1])
            tile = choice_tile(self.geometry, num_blocks, max_chunk=128, whole=0)
            limited = replace(plan.topk.choice, tile=tile, scratch_bytes=1)
            plan = replace(plan, topk=replace(plan.topk, choice=limited))
        self.blocks = backend.select_blocks_forward(self.q, self.k_cmp, lse, self.call, plan=plan)
        q, lse = self.q[:, : self.used], lse[:, : self.used]
        if self.case.equal_scores:  # the reference's sums round apart what is equal
            scores = reference.importance_scores(q, self.k_cmp, lse, self.geometry, *tail)
            expected = reference.choose((scores * 2**12).round(), self.geometry, self.q_start)
        else:
            expected = reference.select_blocks(q, self.k_cmp, lse, self.geometry, self.cu, *tail)
        self.errors["blocks that differ"] = float((self.blocks[:, : self.used] != expected).sum())
        self.errors["blocks outside"] = float((self.blocks[:, self.used :] != -1).sum())


@dataclass(frozen=True)
class Choice:
    """A choice among given scores, for three tokens.

    Args:
        last: the last token's last block.
        scores: their kind, see `given_scores`.
        options: constants of `choice_tile`.
        appended: how often at most in all, and once at least unless 0, a chunk adds to the list.
        pruned: as often, only the best of the list are kept to make room.
        taken: as often, only the best of a chunk are taken.
    """

    geometry: BlockGeometry
    last: int
    scores: str
    options: dict[str, int] = field(default_factory=dict)
    appended: int = 0
    pruned: int = 0
    taken: int = 0


PAIRS = BlockGeometry(2, 1, 2, 16, 1, 2, 4)
SMALL_STEPS, STEPS, LARGE_STEPS = ({"max_chunk": chunk, "whole": 0, "slack": 2} for chunk in (128, 256, 512))
CHOICES = {
    "few blocks": Choice(PAIRS, 20, "random"),
    "one step": Choice(PAIRS, 101, "random"),
    "one step of two rows": Choice(PAIRS, 254, "random"),
    "one step, ties": Choice(PAIRS, 254, "few values"),
    "one chunk": Choice(PAIRS, 300, "random", LARGE_STEPS, appended=3),
    "later chunks have nothing": Choice(PAIRS, 520, "falling", SMALL_STEPS, appended=3),
    "later chunks have all": Choice(PAIRS, 520, "rising", SMALL_STEPS, appended=15),
    "equal": Choice(PAIRS, 390, "equal", SMALL_STEPS, appended=3, taken=3),
    "zero": Choice(PAIRS, 700, "zero", STEPS, appended=3, taken=3),
    "ties across chunks": Choice(PAIRS, 700, "few values", STEPS, appended=3, taken=3),
    "plateaus": Choice(PAIRS, 700, "plateaus", STEPS, appended=9, taken=9),
    "equal, no initial block": Choice(
        BlockGeometry(2, 1, 2, 15, 0, 2, 4), 390, "equal", SMALL_STEPS, appended=3, taken=3,
    ),
    "early row of many": Choice(PAIRS, 4, "random", SMALL_STEPS),
    "fewer blocks than forced": Choice(BlockGeometry(2, 1, 2, 16, 6, 5, 4), 8, "random", SMALL_STEPS),
    "loose bounds": Choice(PAIRS, 1040, "random", STEPS | {"slack": 16}, appended=15, pruned=15),
    "loose bounds, ties": Choice(PAIRS, 1040, "some values", STEPS | {"slack": 16}, appended=15, pruned=15),
    "loose bounds, a list of two rows": Choice(
        BlockGeometry(2, 1, 2, 33, 1, 2, 4), 1040, "some values", LARGE_STEPS | {"slack": 24}, appended=9, pruned=9,
    ),
    "loose bounds, not a number": Choice(PAIRS, 1040, "not a number", STEPS | {"slack": 16}, appended=15, pruned=15),
    "loose bounds, neighbouring bits": Choice(PAIRS, 1040, "bits", STEPS | {"slack": 16}, appended=15, pruned=15),
    "many in few groups": Choice(PAIRS, 1040, "columns", LARGE_STEPS, appended=9, taken=9),
    "many in few groups of a later chunk": Choice(
        PAIRS, 1040, "late columns", LARGE_STEPS | {"slack": 6}, appended=9, pruned=9, taken=9,
    ),
    "denormal": Choice(PAIRS, 520, "denormal", STEPS, appended=9),
    "infinite": Choice(PAIRS, 520, "infinite", STEPS, appended=9, taken=9),
    "not a number": Choice(PAIRS, 520, "not a number", STEPS, appended=9),
    "forced blocks in two chunks": Choice(BlockGeometry(2, 1, 2, 16, 6, 5, 4), 130, "forced", SMALL_STEPS, appended=3),
    "local blocks only in the last chunk": Choice(
        BlockGeometry(2, 1, 2, 16, 6, 5, 4), 133, "forced", SMALL_STEPS, appended=3,
    ),
    "no initial block": Choice(BlockGeometry(2, 1, 2, 16, 0, 1, 4), 260, "random", SMALL_STEPS, appended=9),
    "one free block": Choice(BlockGeometry(2, 1, 2, 7, 4, 2, 4), 260, "few values", SMALL_STEPS, appended=3),
    "forced blocks only": Choice(BlockGeometry(2, 1, 2, 6, 4, 2, 4), 260, "random", SMALL_STEPS),
    "a list of two rows": Choice(BlockGeometry(2, 1, 2, 33, 1, 2, 4), 700, "random", STEPS, appended=9),
    "a list of two rows, plateaus": Choice(
        BlockGeometry(2, 1, 2, 33, 1, 2, 4), 1040, "plateaus", LARGE_STEPS, appended=6, pruned=3,
    ),
    "more chosen than groups": Choice(BlockGeometry(2, 1, 2, 135, 1, 2, 4), 400, "random", SMALL_STEPS, appended=12),
    "more chosen than groups, ties": Choice(
        BlockGeometry(2, 1, 2, 135, 1, 2, 4), 400, "zero", SMALL_STEPS, appended=12,
    ),
    "blocks without a visible key": Choice(BlockGeometry(6, 2, 4, 16, 1, 1, 4), 300, "random", SMALL_STEPS, appended=9),
    "keys that do not overlap": Choice(BlockGeometry(2, 2, 4, 16, 1, 1, 4), 300, "random", SMALL_STEPS, appended=9),
}  # fmt: skip


def given_scores(kind: str, count: int, geometry: BlockGeometry, last: int) -> Tensor:
    j, random = torch.arange(count), torch.rand(count)
    column = (j % 128 % 11 == 5).float()  # 12 of 128 groups
    scores = {
        "random": random,
        "equal": torch.full([count], 0.25),
        "zero": torch.zeros(count),
        "few values": torch.randint(4, [count]).float(),
        "rising": j + 1.0,
        "falling": count - j + 0.0,
        "some values": torch.randint(99, [count]).float(),
        "plateaus": torch.where(j % 256 > 40, 1.0 + j // 256, random),
        "columns": random + column,
        "late columns": random + column * (j // 512),
        "denormal": torch.randint(50, [count]) * 1e-44,
        "infinite": torch.where(random < 0.3, float("inf"), random),
        "not a number": torch.where(random < 0.01, float("nan"), torch.where(random > 0.99, float("inf"), random)),
        "bits": torch.randperm(count).int().view(torch.float32),
        "forced": random,
    }[kind]
    if kind == "forced":
        scores[: geometry.num_init_blocks] = scores[last + 1 - geometry.num_local_blocks :] = 2.0
    return scores.float()


def best_blocks(scores: Tensor, geometry: BlockGeometry) -> list[int]:
    """The choice in Python; infinite scores and those that are not a number tie above all others."""
    count, num = geometry.num_selected_blocks, len(scores)
    free = range(geometry.num_init_blocks, num - geometry.num_local_blocks)
    value = scores.nan_to_num(nan=float("inf")).clamp(max=torch.finfo(torch.float32).max).tolist()
    best = sorted(free, key=lambda j: (-value[j], j))[: count - geometry.num_init_blocks - geometry.num_local_blocks]
    chosen = sorted({*range(num)} - {*free} | {*best})
    return chosen + [-1] * (count - len(chosen))


def choose_given(choice: Choice) -> dict[str, float]:
    """Compare the choice among given scores, for three tokens whose blocks end at `last` and the one before it."""
    torch.manual_seed(0)
    geometry, last, kind = choice.geometry, choice.last, choice.scores
    size, stride, block = geometry.as_tuple()[:3]
    span, reach, start = block // stride, size // stride, last * block - 1
    N = geometry.num_compressed(start + 3)
    half = triton.cdiv(N, 128) * 128 // span
    width = half * min(reach, 2)
    rows = torch.full([3 * width + 4], float("nan"))
    expected = []
    for t in range(3):
        num, written = (start + t) // block + 1, triton.cdiv(geometry.num_compressed(start + t + 1), span)
        scores = given_scores(kind, num, geometry, num - 1)
        scores[written + (reach > 1) :] = 0.0
        own, before = rows[t * width :][:written], rows[t * width + half :][: written if reach > 1 else 0]
        own[:] = scores[:written]
        before[:] = 0.0
        if reach > 1 and kind == "random":
            before[:] = torch.rand(written)
            scores[written:] = 0.0
            scores[1 : written + 1] += before[: num - 1]
        expected.append(best_blocks(scores, geometry))
    tile = choice_tile(geometry, last + 1, **choice.options)
    out = torch.full([1, 3, 1, geometry.num_selected_blocks], -7, dtype=torch.int32)
    lists = torch.full([3 * tile["QUADS"] + 1], 4, dtype=torch.int32)
    calls = dict.fromkeys(("_append", "_read_quads", "_best"), 0)
    functions = {name: getattr(choices, name) for name in calls}

    def counted(name: str, *args, **kwargs):
        calls[name] += 1
        return functions[name](*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(choices, name, partial(counted, name))
        choices.choice_kernel[(3, 1)](
            rows, lists, out, lists, 3, start, 0, 0, 3, width, HKV=1, SIZE=size, STRIDE=stride, BLOCK=block,
            COUNT=geometry.num_selected_blocks, INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks,
            PACKED=False, POOLED=True, **tile,
        )  # fmt: skip
    final = 3 * (calls["_best"] > 0)
    pruned = calls["_read_quads"] - final * (tile["QUADS"] > 0)
    paths = {"appended": calls["_append"] - pruned, "pruned": pruned, "taken": calls["_best"] - final - pruned}
    errors = {"blocks that differ": float((out[0, :, 0] != torch.tensor(expected)).sum())}
    for path, times in paths.items():
        most = getattr(choice, path)
        errors[f"{path} {times} times of {most}"] = float(times > most or (times == 0) != (most == 0))
    return errors


def compare(case: Case) -> dict[str, float]:
    """The errors of a case's stages."""
    return Comparison(case).run()
