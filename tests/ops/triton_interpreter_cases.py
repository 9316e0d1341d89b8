"""Run every Triton kernel in the interpreter against the reference; prints one JSON line for each case.

A program of its own, because TRITON_INTERPRET is read when the kernels are defined:

    TRITON_INTERPRET=1 PYTHONPATH=src python tests/ops/triton_interpreter_cases.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import triton
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import reference, triton as backend
from nsa.ops.triton.gpu import read_device
from nsa.ops.triton.plan import Plan, Shapes, make_plan
from nsa.ops.triton.tiles import choice_tile
from nsa.ops.triton.topk import choice

SMALL = BlockGeometry(8, 4, 16, 4, 1, 2, 24)
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates")
WIDE = BlockGeometry(8, 4, 16, 4, 1, 2, 60)
LONG = BlockGeometry(16, 16, 144, 2, 0, 1, 9)

# name -> batch, tokens, heads, groups, Dk, Dv, geometry, document bounds, q_start, k_start, dtype, stages
CASES = {
    "three heads a group, batch of two, Dk != Dv": (2, 41, 3, 1, 16, 32, SMALL, None, 0, 0, "float32", "pcwsau"),
    "packed, empty and short documents": (1, 52, 4, 2, 16, 16, SMALL, [0, 0, 25, 25, 28, 52], 0, 0, "float32",
                                          "pcwsau"),
    "rows after the last document": (1, 30, 2, 1, 16, 16, SMALL, [0, 19], 0, 0, "float32", "cwsa"),
    "whole tiles after the last document": (1, 150, 2, 1, 16, 16, WIDE, [0, 19], 0, 0, "float32", "cw"),
    "chunk of a prefill": (1, 14, 2, 2, 16, 16, SMALL, None, 37, 11, "float32", "cws"),
    "one token": (1, 1, 2, 1, 16, 16, SMALL, None, 0, 0, "float32", "pcwsau"),
    "no token": (1, 0, 2, 1, 16, 16, SMALL, None, 0, 0, "float32", "pcwsau"),
    "head size that fits no tile, fp16": (1, 33, 2, 1, 20, 12, SMALL, None, 0, 0, "float16", "cwsa"),
    "long selection blocks in parts": (1, 150, 1, 1, 16, 16, LONG, None, 0, 0, "float32", "sau"),
    "long stencil": (1, 60, 1, 1, 16, 16, BlockGeometry(24, 4, 8, 5, 1, 1, 7), None, 0, 0, "float32", "s"),
    "forced blocks only": (1, 60, 2, 1, 16, 16, BlockGeometry(8, 4, 16, 3, 1, 2, 24), None, 0, 0, "float32", "sa"),
    "choice in many chunks": (1, 6, 1, 1, 16, 16, BlockGeometry(4, 2, 4, 5, 1, 2, 4), None, 1597, 0, "float32", "t"),
    "choice in many chunks of keys' sums": (
        1, 6, 1, 1, 16, 16, BlockGeometry(24, 4, 8, 5, 1, 1, 7), None, 3000, 0, "float32", "t"),
    "choice in chunks, packed": (1, 20, 2, 1, 16, 16, SMALL, [0, 5, 20], 0, 0, "float32", "t"),
    "more blocks of a token than groups of candidates": (
        1, 260, 1, 1, 16, 16, BlockGeometry(4, 2, 4, 40, 1, 2, 8), None, 0, 0, "float32", "s"),
    "equal scores": (1, 100, 2, 1, 16, 16, SMALL, None, 0, 0, "float32", "et"),
    "scratch for few tokens": (1, 140, 1, 1, 16, 16, SMALL, None, 0, 0, "float32", "ska"),
}  # fmt: skip


def relative_error(x: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """The error's norm over that of what is expected, or over `least` where that may be zero."""
    x, expected = x.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(x), finite):
        return float("inf")
    return float((x - expected)[finite].norm() / expected[finite].norm().clamp(min=least))


class Case:
    """Inputs of one case and the comparison of each stage."""

    def __init__(self, B, T, H, Hkv, Dk, Dv, geometry, bounds, q_start, k_start, dtype, stages) -> None:
        torch.manual_seed(0)
        self.cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        self.geometry, self.q_start, self.k_start, self.dtype = geometry, q_start, k_start, getattr(torch, dtype)
        S = q_start + T
        pieces = [S] if bounds is None else [b - a for a, b in pairwise(bounds)]
        N = sum(geometry.num_compressed(piece) for piece in pieces)
        self.used = T if bounds is None else bounds[-1]
        self.q, self.k, self.v = self.draw(B, T, H, Dk), self.draw(B, S, Hkv, Dk), self.draw(B, S, Hkv, Dv)
        self.k_cmp, self.v_cmp = self.draw(B, N, Hkv, Dk), self.draw(B, N, Hkv, Dv)
        self.scale, self.stages, self.errors = Dk**-0.5, stages, {}
        num_docs = B if bounds is None else len(bounds) - 1
        self.shapes = Shapes(B, T, H, Hkv, Dk, Dv, self.dtype, geometry, num_docs, N, q_start)
        self.plan = self.make_plan()
        if "e" in stages:
            self.q, self.k_cmp = torch.zeros_like(self.q), torch.zeros_like(self.k_cmp)

    def make_plan(self, unions: bool | None = None) -> Plan:
        """The plan of the case; with scratch for few tokens where it says so."""
        plan = make_plan(self.shapes, read_device(self.q.device), unions)
        if "k" not in self.stages:
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
        """Compare forward and backward; `before` and `after` are the arguments around cu_seqlens and geometry."""
        # Tokens after the last document are no part of the reference's input; compressed keys always belong to one.
        lengths = [self.used if self.cu is not None and x.shape[1] == self.q.shape[1] else x.shape[1] for x in inputs]
        exact = [x[:, :length].double().requires_grad_() for x, length in zip(inputs, lengths, strict=True)]
        cut = [x[:, : self.used] for x in before]
        expected = getattr(reference, name)(*exact, *cut, self.geometry, self.cu, *after)
        out, lse = getattr(backend, f"{name}_forward")(
            *inputs, *before, self.cu, self.geometry.as_tuple(), *after, plan=self.plan
        )
        outside = [out[:, self.used :].abs().sum(), torch.isfinite(lse[:, self.used :]).sum()]
        self.errors[name] = max(relative_error(x[:, : self.used], y) for x, y in zip((out, lse), expected, strict=True))
        dout, dlse = self.draw(*out.shape), torch.randn(lse.shape)
        dlse = torch.where(torch.isfinite(lse), dlse, 0.0)
        # The gradients of rows outside any document must not leak into the keys.
        arguments = (dout, dlse, *inputs, out, lse, *before, self.cu, self.geometry.as_tuple(), *after)
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
        shape, cu, stages = self.geometry.as_tuple(), self.cu, self.stages
        if "p" in stages:
            x = self.k.double().requires_grad_()
            pooled = reference.mean_pool(x, self.geometry, cu, self.k_cmp.shape[1])
            mine = backend.mean_pool_forward(self.k, cu, shape, self.k_cmp.shape[1])
            self.errors["mean_pool"] = relative_error(mine, pooled)
            dout = self.draw(*pooled.shape)
            wanted = (
                torch.autograd.grad((pooled * dout.double()).sum(), x)[0]
                if pooled.requires_grad
                else torch.zeros_like(x)
            )
            mine = backend.mean_pool_backward(dout, cu, shape, self.k.shape[1])
            self.errors["mean_pool dx"] = relative_error(mine, wanted)
        compressed = (self.q, self.k_cmp, self.v_cmp)
        if "c" in stages:
            self.attention("compressed_attention", compressed, (), (self.q_start, self.scale))
        if "w" in stages:
            window = (self.q, self.k[:, self.k_start :], self.v[:, self.k_start :])
            self.attention("window_attention", window, (), (self.q_start, self.k_start, self.scale))
        if {"s", "t", "a"} & set(stages):
            self.choice(limit="t" in stages)
        if "s" in stages:
            self.attention("selected_attention", (self.q, self.k, self.v), (self.blocks,), (self.q_start, self.scale))
        if "a" in stages:
            self.whole("whole", union=False)
        if "u" in stages:
            self.whole("union", union=True)
        return self.errors

    def whole(self, name: str, union: bool) -> None:
        """Compare the whole operator with its stages by the reference, for gates of either sign."""
        plan = self.make_plan(union)
        gates = self.draw(*self.q.shape[:3], 3)
        keys = (self.k, self.v, self.k_cmp, self.v_cmp, self.draw(*self.k.shape), self.draw(*self.v.shape))
        inputs = (self.q, *keys, gates)
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
        constants = (self.cu, self.geometry.as_tuple(), self.scale)
        out, *saved = backend.attention_forward(*inputs, *constants, plan=plan)
        self.errors[name] = relative_error(out[:, : self.used], expected)
        self.errors[f"{name} blocks"] = float((saved[-1] != self.blocks).sum())
        dout = self.draw(*out.shape)
        grads = backend.attention_backward(dout, *inputs, *saved, *constants, plan=plan)
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
        shape, tail, plan = self.geometry.as_tuple(), (self.q_start, self.scale), self.plan
        _, lse = backend.compressed_attention_forward(self.q, self.k_cmp, self.v_cmp, self.cu, shape, *tail, plan=plan)
        if limit:
            num_blocks = self.geometry.num_select_blocks(self.q_start + self.q.shape[1])
            tile = choice_tile(self.geometry, num_blocks, max_chunk=128, whole=0)
            limited = replace(plan.topk.choice, tile=tile, scratch_bytes=1)
            plan = replace(plan, topk=replace(plan.topk, choice=limited))
        self.blocks = backend.select_blocks_forward(self.q, self.k_cmp, lse, self.cu, shape, *tail, plan=plan)
        q, lse = self.q[:, : self.used], lse[:, : self.used]
        if "e" in self.stages:  # the reference's sums round apart what is equal
            scores = reference.importance_scores(q, self.k_cmp, lse, self.geometry, *tail)
            expected = reference.choose((scores * 2**12).round(), self.geometry, self.q_start)
        else:
            expected = reference.select_blocks(q, self.k_cmp, lse, self.geometry, self.cu, *tail)
        self.errors["blocks that differ"] = float((self.blocks[:, : self.used] != expected).sum())
        self.errors["blocks outside"] = float((self.blocks[:, self.used :] != -1).sum())


# name -> geometry, last block, scores, constants of choice_tile; how often at most, and once at least unless 0, in the
# 3 rows a chunk adds to the list, only the best of the list are kept to make room, only the best of a chunk are taken
PAIRS = BlockGeometry(2, 1, 2, 16, 1, 2, 4)
SMALL_STEPS, STEPS, LARGE_STEPS = ({"max_chunk": chunk, "whole": 0, "slack": 2} for chunk in (128, 256, 512))
CHOICES = {
    "few blocks": (PAIRS, 20, "random", {}, (0, 0, 0)),
    "one step": (PAIRS, 101, "random", {}, (0, 0, 0)),
    "one step of two rows": (PAIRS, 254, "random", {}, (0, 0, 0)),
    "one step, ties": (PAIRS, 254, "few values", {}, (0, 0, 0)),
    "one chunk": (PAIRS, 300, "random", LARGE_STEPS, (3, 0, 0)),
    "later chunks have nothing": (PAIRS, 520, "falling", SMALL_STEPS, (3, 0, 0)),
    "later chunks have all": (PAIRS, 520, "rising", SMALL_STEPS, (15, 0, 0)),
    "equal": (PAIRS, 390, "equal", SMALL_STEPS, (3, 0, 3)),
    "zero": (PAIRS, 700, "zero", STEPS, (3, 0, 3)),
    "ties across chunks": (PAIRS, 700, "few values", STEPS, (3, 0, 3)),
    "plateaus": (PAIRS, 700, "plateaus", STEPS, (9, 0, 9)),
    "equal, no initial block": (BlockGeometry(2, 1, 2, 15, 0, 2, 4), 390, "equal", SMALL_STEPS, (3, 0, 3)),
    "early row of many": (PAIRS, 4, "random", SMALL_STEPS, (0, 0, 0)),
    "fewer blocks than forced": (BlockGeometry(2, 1, 2, 16, 6, 5, 4), 8, "random", SMALL_STEPS, (0, 0, 0)),
    "loose bounds": (PAIRS, 1040, "random", STEPS | {"slack": 16}, (15, 15, 0)),
    "loose bounds, ties": (PAIRS, 1040, "some values", STEPS | {"slack": 16}, (15, 15, 0)),
    "loose bounds, a list of two rows": (
        BlockGeometry(2, 1, 2, 33, 1, 2, 4), 1040, "some values", LARGE_STEPS | {"slack": 24}, (9, 9, 0)),
    "loose bounds, not a number": (PAIRS, 1040, "not a number", STEPS | {"slack": 16}, (15, 15, 0)),
    "loose bounds, neighbouring bits": (PAIRS, 1040, "bits", STEPS | {"slack": 16}, (15, 15, 0)),
    "many in few groups": (PAIRS, 1040, "columns", LARGE_STEPS, (9, 0, 9)),
    "many in few groups of a later chunk": (PAIRS, 1040, "late columns", LARGE_STEPS | {"slack": 6}, (9, 9, 9)),
    "denormal": (PAIRS, 520, "denormal", STEPS, (9, 0, 0)),
    "infinite": (PAIRS, 520, "infinite", STEPS, (9, 0, 9)),
    "not a number": (PAIRS, 520, "not a number", STEPS, (9, 0, 0)),
    "forced blocks in two chunks": (BlockGeometry(2, 1, 2, 16, 6, 5, 4), 130, "forced", SMALL_STEPS, (3, 0, 0)),
    "local blocks only in the last chunk": (BlockGeometry(2, 1, 2, 16, 6, 5, 4), 133, "forced", SMALL_STEPS, (3, 0, 0)),
    "no initial block": (BlockGeometry(2, 1, 2, 16, 0, 1, 4), 260, "random", SMALL_STEPS, (9, 0, 0)),
    "one free block": (BlockGeometry(2, 1, 2, 7, 4, 2, 4), 260, "few values", SMALL_STEPS, (3, 0, 0)),
    "forced blocks only": (BlockGeometry(2, 1, 2, 6, 4, 2, 4), 260, "random", SMALL_STEPS, (0, 0, 0)),
    "a list of two rows": (BlockGeometry(2, 1, 2, 33, 1, 2, 4), 700, "random", STEPS, (9, 0, 0)),
    "a list of two rows, plateaus": (BlockGeometry(2, 1, 2, 33, 1, 2, 4), 1040, "plateaus", LARGE_STEPS, (6, 3, 0)),
    "more chosen than groups": (BlockGeometry(2, 1, 2, 135, 1, 2, 4), 400, "random", SMALL_STEPS, (12, 0, 0)),
    "more chosen than groups, ties": (BlockGeometry(2, 1, 2, 135, 1, 2, 4), 400, "zero", SMALL_STEPS, (12, 0, 0)),
    "blocks without a visible key": (BlockGeometry(6, 2, 4, 16, 1, 1, 4), 300, "random", SMALL_STEPS, (9, 0, 0)),
    "keys that do not overlap": (BlockGeometry(2, 2, 4, 16, 1, 1, 4), 300, "random", SMALL_STEPS, (9, 0, 0)),
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


def choose_given(geometry: BlockGeometry, last: int, kind: str, options: dict, paths: tuple | None) -> dict[str, float]:
    """Compare the choice among given scores, for three tokens whose blocks end at `last` and the one before it."""
    torch.manual_seed(0)
    size, stride, block = geometry.as_tuple()[:3]
    span, reach, start = block // stride, size // stride, last * block - 1
    N = geometry.num_compressed(start + 3)
    half = triton.cdiv(N, 128) * 128 // span
    width = half * min(reach, 2)
    mass = torch.full([3 * width + 4], float("nan"))
    expected = []
    for t in range(3):
        num, written = (start + t) // block + 1, triton.cdiv(geometry.num_compressed(start + t + 1), span)
        scores = given_scores(kind, num, geometry, num - 1)
        scores[written + (reach > 1) :] = 0.0
        own, before = mass[t * width :][:written], mass[t * width + half :][: written if reach > 1 else 0]
        own[:] = scores[:written]
        before[:] = 0.0
        if reach > 1 and kind == "random":
            before[:] = torch.rand(written)
            scores[written:] = 0.0
            scores[1 : written + 1] += before[: num - 1]
        expected.append(best_blocks(scores, geometry))
    tile = choice_tile(geometry, last + 1, **options)
    out = torch.full([1, 3, 1, geometry.num_selected_blocks], -7, dtype=torch.int32)
    lists = torch.full([3 * tile["QUADS"] + 1], 4, dtype=torch.int32)
    calls = dict.fromkeys(("_append", "_read_quads", "_best"), 0)
    functions = {name: getattr(choice, name) for name in calls}

    def counted(name: str, *args, **kwargs):
        calls[name] += 1
        return functions[name](*args, **kwargs)

    for name in calls:
        setattr(choice, name, partial(counted, name))
    choice.choice_kernel[(3, 1)](
        mass, lists, out, lists, 3, start, 0, 0, 3, width, HKV=1, SIZE=size, STRIDE=stride, BLOCK=block,
        COUNT=geometry.num_selected_blocks, INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks,
        PACKED=False, POOLED=True, **tile,
    )  # fmt: skip
    for name, function in functions.items():
        setattr(choice, name, function)
    final = 3 * (calls["_best"] > 0)
    kept = calls["_read_quads"] - final * (tile["QUADS"] > 0)
    found = (calls["_append"] - kept, kept, calls["_best"] - final - kept)
    errors = {"blocks that differ": float((out[0, :, 0] != torch.tensor(expected)).sum())}
    errors[f"paths {found}"] = float(
        any(x > most or (x == 0) != (most == 0) for x, most in zip(found, paths, strict=True))
    )
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(json.dumps({"case": name, "dtype": case[10], "errors": Case(*case).run()}), flush=True)
    for name, (*given, paths) in CHOICES.items():
        errors = choose_given(*given, paths)
        print(json.dumps({"case": f"choice: {name}", "dtype": "float32", "errors": errors}), flush=True)
