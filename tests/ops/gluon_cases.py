"""Run the Gluon kernels for Hopper in the emulator against the reference; prints one JSON line for each case and seed.

    PYTHONPATH=src:tests python tests/ops/gluon_cases.py             # all cases, with their seeds
    PYTHONPATH=src:tests python tests/ops/gluon_cases.py packed 7    # cases whose names hold a word, with one seed

Plain kernels around them run in the emulator too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import reference, triton as backend
from nsa.ops.triton.dense import backward as dense_backward
from nsa.ops.triton.gpu import Device
from nsa.ops.triton.layout import make_layout
from nsa.ops.triton.plan import Plan, Shapes, make_plan
from nsa.ops.triton.selected import forward as selected_forward, forward_sm90 as selected_forward_sm90, union as unions
from ops.gluon_emulator import emulate

SMALL = BlockGeometry(8, 4, 16, 4, 1, 2, 24)
WIDE = BlockGeometry(8, 4, 16, 4, 1, 2, 150)
EDGE = BlockGeometry(8, 4, 16, 4, 1, 2, 127)  # intervals begin and end one from where a step does
BLOCKS = BlockGeometry(4, 2, 64, 4, 1, 1, 40)
ODD = BlockGeometry(8, 4, 48, 3, 1, 1, 40)
FEW = BlockGeometry(4, 2, 64, 2, 1, 1, 40)
FORCED = BlockGeometry(4, 2, 64, 6, 2, 3, 150)
BARE = BlockGeometry(4, 2, 64, 4, 0, 1, 40)  # no initial block

# name -> batch, tokens, heads, groups, size of keys (values have 128 at most), geometry, document bounds, q_start,
# k_start, dtype, multiprocessors, what runs: c compressed branch, w window, s selected branch by unions, a whole
# operator, u with unions in it, k with scratch for few tokens at a time, r with short ranges of tokens, f selected
# branch for lists that hold later blocks too
CASES = {
    "batch of two, two groups": (2, 75, 8, 2, 64, SMALL, None, 0, 0, "bfloat16", 2, "cw"),
    "many steps": (1, 230, 4, 1, 64, WIDE, None, 0, 0, "float16", 1, "w"),
    "one head a group": (1, 201, 1, 1, 64, EDGE, None, 0, 0, "float16", 1, "cw"),
    "many heads a group, edges of steps": (1, 18, 32, 1, 64, EDGE, None, 256, 130, "float16", 2, "cw"),
    "five heads a group": (2, 50, 5, 1, 64, SMALL, None, 0, 0, "float16", 1, "cw"),
    "head size 128": (1, 70, 16, 1, 128, SMALL, None, 0, 0, "bfloat16", 2, "cw"),
    "keys of 192, values of 128": (1, 70, 16, 1, 192, SMALL, None, 0, 0, "bfloat16", 2, "cw"),
    "keys of 192, packed, three heads": (1, 90, 3, 1, 192, SMALL, [0, 13, 80], 0, 0, "float16", 1, "cw"),
    "rows in two splits": (1, 90, 16, 1, 64, SMALL, None, 0, 0, "float16", 3, "c"),
    "packed, empty and short documents": (1, 120, 4, 1, 64, SMALL, [0, 0, 51, 51, 54, 120], 0, 0, "float16", 1, "cw"),
    "rows after the last document": (1, 61, 8, 1, 64, SMALL, [0, 43], 0, 0, "bfloat16", 2, "cw"),
    "whole tiles after the last document": (1, 200, 4, 2, 64, WIDE, [0, 19], 0, 0, "float16", 3, "cw"),
    "chunk of a prefill": (1, 30, 8, 2, 64, SMALL, None, 150, 111, "float16", 1, "cw"),
    "one token": (1, 1, 4, 1, 64, SMALL, None, 0, 0, "bfloat16", 1, "cw"),
    "whole": (1, 420, 8, 2, 64, BLOCKS, None, 0, 0, "float16", 3, "a"),
    "whole, head size 128": (2, 330, 2, 1, 128, BLOCKS, None, 0, 0, "bfloat16", 1, "a"),
    "whole, keys of 192": (1, 400, 4, 1, 192, BLOCKS, None, 0, 0, "float16", 2, "a"),
    "whole, packed, keys of 192, three heads": (1, 330, 6, 2, 192, BLOCKS, [0, 0, 20, 320], 0, 0, "bfloat16", 2, "ak"),
    "whole, unions, keys of 192": (1, 230, 3, 1, 192, BLOCKS, None, 0, 0, "float16", 2, "au"),
    "whole, blocks of 48 tokens": (1, 190, 4, 1, 64, ODD, None, 0, 0, "float16", 2, "a"),
    "whole, packed, five heads a group": (1, 450, 5, 1, 64, BLOCKS, [0, 0, 20, 440], 0, 0, "float16", 2, "ak"),
    "whole, packed, four heads a group": (
        1, 520, 8, 2, 64, BLOCKS, [0, 0, 20, 150, 151, 490], 0, 0, "float16", 2, "ak",
    ),
    "whole, packed, one head a group": (1, 420, 1, 1, 64, BLOCKS, [0, 20, 410], 0, 0, "float16", 2, "a"),
    "whole, packed, one head a group, no initial block": (
        1, 600, 1, 1, 64, BARE, [0, 3, 70, 72, 420, 590], 0, 0, "float16", 2, "a",
    ),
    "whole, many forced blocks, keys of 192": (1, 700, 16, 1, 192, FORCED, [0, 700], 0, 0, "bfloat16", 2, "ar"),
    "whole, unions": (1, 420, 8, 2, 64, BLOCKS, None, 0, 0, "float16", 3, "au"),
    "whole, unions, packed, five heads a group": (1, 350, 5, 1, 64, BLOCKS, [0, 0, 20, 340], 0, 0, "float16", 2, "au"),
    "whole, unions, small scratch": (1, 330, 4, 2, 128, BARE, [0, 0, 20, 320], 0, 0, "float16", 2, "auk"),
    "whole, ranges, no initial block": (2, 500, 4, 2, 64, BARE, None, 0, 0, "float16", 2, "akr"),
    "whole, 32 heads a group": (1, 250, 32, 1, 64, BLOCKS, None, 0, 0, "bfloat16", 2, "ar"),
    "lists with later blocks": (1, 300, 2, 1, 64, BARE, None, 0, 0, "float16", 2, "f"),
    "unions, 16 heads a group": (1, 190, 16, 1, 64, FEW, None, 1300, 0, "float16", 2, "s"),
    "unions, 32 heads a group, batch of two": (2, 31, 64, 2, 64, FEW, None, 1000, 0, "bfloat16", 3, "s"),
    "unions, 64 heads a group": (1, 40, 64, 1, 64, FEW, None, 1279, 0, "float16", 1, "s"),
    "unions, 6 heads a group, short documents": (1, 310, 6, 1, 64, FEW, [0, 3, 3, 67, 300], 0, 0, "float16", 2, "s"),
    "unions, 4 heads a group": (1, 120, 8, 2, 64, FEW, None, 850, 0, "float16", 2, "s"),
    "unions, three heads a group, keys of 192": (1, 230, 3, 1, 192, FEW, None, 900, 0, "bfloat16", 2, "s"),
    "unions, 48 heads a group, keys of 192": (1, 11, 48, 1, 192, FEW, None, 1000, 0, "float16", 1, "s"),
    "unions, no block twice": (1, 6, 64, 1, 64, FEW, None, 2000, 0, "bfloat16", 1, "s"),
    "unions, head size 128": (1, 61, 16, 1, 128, FEW, [0, 61], 0, 0, "float16", 1, "s"),
    "unions, a tile partly beyond the tokens": (1, 70, 16, 1, 128, FEW, None, 500, 0, "bfloat16", 5, "s"),
}  # fmt: skip
SEEDS = range(3)
RANGES = selected_forward_sm90.RANGE_ROWS, selected_forward_sm90.RANGE_BYTES
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates")


def row_error(x: Tensor, expected: Tensor) -> float:
    """The largest error of a row over the root mean square of the rows, or over 1e-2 where that is smaller."""
    x, expected = x.double(), expected.detach().double()
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(x), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, expected = torch.where(finite, x - expected, 0.0), torch.where(finite, expected, 0.0)
    size = expected.norm(dim=-1).square().mean().sqrt().clamp(min=1e-2)
    return float(difference.norm(dim=-1).max() / size)


def with_small_scratch(plan: Plan) -> Plan:
    """The plan with scratch for few tokens at a time."""
    topk = replace(plan.topk, choice=replace(plan.topk.choice, scratch_bytes=1))
    forward, backward = (
        replace(stage, scratch_bytes=2**18) for stage in (plan.selected.forward, plan.selected.backward)
    )
    return replace(plan, topk=topk, selected=replace(plan.selected, forward=forward, backward=backward))


class Case:
    """Inputs of one case and the comparison of each branch."""

    def __init__(
        self, B, T, H, Hkv, D, geometry, bounds, q_start, k_start, dtype, multiprocessors, branches
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        self.geometry, self.dtype, self.branches = geometry, getattr(torch, dtype), branches
        self.q_start, self.k_start = q_start, k_start
        S = q_start + T
        pieces = [S] if bounds is None else [b - a for a, b in pairwise(bounds)]
        N = sum(geometry.num_compressed(piece) for piece in pieces)
        self.used = T if bounds is None else bounds[-1]
        self.q = self.draw(B, T, H, D)
        self.value_size = min(D, 128)
        self.compressed = (self.draw(B, N, Hkv, D), self.draw(B, N, Hkv, self.value_size))
        self.window = (self.draw(B, S - k_start, Hkv, D), self.draw(B, S - k_start, Hkv, self.value_size))
        self.planned: set[str] = set()
        self.scale, self.errors = (2 if "a" in branches else 1) * D**-0.5, {}
        self.numbers = (B, S, Hkv, N)
        num_docs = B if bounds is None else len(bounds) - 1
        shapes = Shapes(B, T, H, Hkv, D, self.value_size, self.dtype, geometry, num_docs, N, q_start)
        device = Device((9, 0), 232448, multiprocessors, total_memory=2**40)
        self.plan = make_plan(shapes, device, unions="u" in branches)
        if "k" in branches:
            self.plan = with_small_scratch(self.plan)
        self.by_union = make_plan(shapes, device, unions=True).selected

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def run(self) -> dict[str, float]:
        if "c" in self.branches:
            self.branch("compressed_attention", *self.compressed, (self.q_start, self.scale))
        if "w" in self.branches:
            self.branch("window_attention", *self.window, (self.q_start, self.k_start, self.scale))
        if "s" in self.branches:
            self.unions()
        if "a" in self.branches:
            self.whole("r" in self.branches)
        if "f" in self.branches:
            self.later()
        return self.errors

    def branch(self, name: str, k: Tensor, v: Tensor, numbers: tuple) -> None:
        """Compare forward and backward."""
        # Tokens after the last document are no part of the reference's input; compressed keys always belong to one.
        window, used = name == "window_attention", self.used
        lengths = [used, *[used if window and self.cu is not None else k.shape[1]] * 2]
        inputs = (self.q, k, v)
        exact = [x[:, :length].double().requires_grad_() for x, length in zip(inputs, lengths, strict=True)]
        expected = getattr(reference, name)(*exact, self.geometry, self.cu, *numbers)
        constants = (self.cu, self.geometry.as_tuple(), *numbers)
        out, lse = getattr(backend, f"{name}_forward")(*inputs, *constants, plan=self.plan)
        self.errors[f"{name} out"] = row_error(out[:, :used], expected[0])
        self.errors[f"{name} lse"] = row_error(lse[:, :used], expected[1])
        outside = [out[:, used:].abs().sum(), torch.isfinite(lse[:, used:]).sum()]

        # The gradients of rows outside any document must not leak into the keys.
        dout, dlse = self.draw(*out.shape), torch.where(torch.isfinite(lse), torch.randn(lse.shape), 0.0)
        grads = getattr(backend, f"{name}_backward")(dout, dlse, *inputs, out, lse, *constants, plan=self.plan)
        finite = torch.where(torch.isfinite(expected[1]), expected[1], 0.0)
        loss = (expected[0] * dout[:, :used].double()).sum() + (finite * dlse[:, :used].double()).sum()
        wanted = torch.autograd.grad(loss, exact, allow_unused=True, materialize_grads=True)
        for x, y, length, label in zip(grads, wanted, lengths, ("dq", "dk", "dv"), strict=True):
            self.errors[f"{name} {label}"] = row_error(x[:, :length], y)
            outside.append(x[:, length:].abs().sum())
        self.errors[f"{name} outside"] = float(sum(outside))
        self.add_up(name, dout, inputs, out, lse, dlse, grads[0])

    def add_up(
        self, name: str, dout: Tensor, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, dlse: Tensor, dq: Tensor
    ) -> None:
        """Compare a given dQ that is added to."""
        window = self.geometry.window_size if name == "window_attention" else 0
        layout = make_layout(self.cu, self.geometry, self.q.shape[1], inputs[1].shape[1])
        rows = dense_backward.Rows(lse, dense_backward.make_delta(out, dout, dlse))
        before = self.draw(*dq.shape)
        expected = before.double() + dq.double()
        numbers = (self.q_start, self.k_start if window else 0, self.scale)
        branch = self.plan.window if window else self.plan.compressed
        what = (self.geometry, layout, window, *numbers, branch, before)
        mine = dense_backward.dense_backward(dout, *inputs, rows, *what)[0]
        self.errors[f"{name} dq on top"] = row_error(mine, expected)

    def lists(self) -> Tensor:
        """Random blocks of each token, and -1.

        Of three runs of neighbours, as many as a group of warps holds, one knows the first and the last block only: it
        skips what lies between.
        """
        B, T, H = self.q.shape[:3]
        Hkv, count, size = self.numbers[2], self.geometry.num_selected_blocks, self.geometry.select_block_size
        tokens = 64 // (H // Hkv)
        bounds = [0, T] if self.cu is None else self.cu.tolist()
        lists = torch.full((B, T, Hkv, count), -1, dtype=torch.int32)
        for b in range(B):
            for first, end in pairwise(bounds):
                for t in range(first, end):
                    seen = (t - first + self.q_start) // size + 1
                    for group in range(Hkv):
                        known = torch.randperm(seen) if (t // tokens + group) % 3 else torch.tensor([0, seen - 1])
                        known = known.unique() if len(known) == 2 else known
                        known = known[: count if (t + 1) % 7 else 1]
                        lists[b, t, group, : len(known)] = known
        return lists

    def unions(self) -> None:
        """Compare the selected branch by unions, for lists that need not come from scores."""
        B, S, Hkv, _N = self.numbers
        k, v = self.draw(B, S, Hkv, self.q.shape[3]), self.draw(B, S, Hkv, self.value_size)
        lists, used = self.lists(), self.used
        layout = make_layout(self.cu, self.geometry, self.q.shape[1], 0)
        shape = (*self.q.shape[:3], self.value_size)
        cmp, win, gates = self.draw(*shape), self.draw(*shape), self.draw(*shape[:3], 3)
        cut = [self.q[:, :used], *(x if self.cu is None else x[:, :used] for x in (k, v))]
        q, *exact = (x.double() for x in cut)
        q.requires_grad_()
        what = (lists[:, :used], self.geometry, self.cu, self.q_start, self.scale)
        expected, expected_lse = reference.selected_attention(q, *exact, *what)
        gated = selected_forward.Gated(cmp, win, gates, torch.empty_like(cmp))
        for name, given in (("", None), ("gated ", gated)):
            what = (lists, self.geometry, layout, self.q_start, self.scale, self.by_union.forward, given)
            out, lse = unions.union_forward(self.q, k, v, *what)
            self.errors[f"unions {name}out"] = row_error(out[:, :used], expected)
            self.errors[f"unions {name}lse"] = row_error(lse[:, :used], expected_lse)
            outside = out[:, used:].abs().sum() + torch.isfinite(lse[:, used:]).sum()
            self.errors[f"unions {name}outside"] = float(outside)
        g = gates[:, :used].double().unsqueeze(-1)
        total = g[..., 0, :] * cmp[:, :used] + g[..., 1, :] * expected + g[..., 2, :] * win[:, :used]
        self.errors["unions sum"] = row_error(gated.out[:, :used], total)

        dout, dlse, before = self.draw(*shape), torch.randn(lse.shape), self.draw(*self.q.shape)
        finite = torch.where(torch.isfinite(expected_lse), expected_lse, 0.0)
        loss = (expected * dout[:, :used]).sum() + (finite * dlse[:, :used]).sum()
        wanted = torch.zeros(self.q.shape, dtype=torch.float64)
        wanted[:, :used] = torch.autograd.grad(loss, q)[0]
        rows = dense_backward.Rows(lse, dense_backward.make_delta(out, dout, dlse))
        what = (dout, self.q, k, v, rows, lists, self.geometry, layout, self.q_start, self.scale)
        what += (self.by_union.dq,)
        self.errors["unions dq"] = row_error(unions.union_dq(*what), wanted)
        on_top = before.double() + wanted
        self.errors["unions dq on top"] = row_error(unions.union_dq(*what, before), on_top)

    def later(self) -> None:
        """The selected branch alone, whose lists may hold blocks that a token does not see yet."""
        B, S, Hkv, _ = self.numbers
        k, v = self.draw(B, S, Hkv, self.q.shape[3]), self.draw(B, S, Hkv, self.value_size)
        own = torch.arange(S, dtype=torch.int32) // self.geometry.select_block_size
        lists = torch.full((B, S, Hkv, self.geometry.num_selected_blocks), -1, dtype=torch.int32)
        lists[..., 0] = own[None, :, None]
        lists[..., 1] = torch.where(own < 3, 3, -1)[None, :, None]
        tail = (lists, self.cu, self.geometry.as_tuple(), self.q_start, self.scale)
        out, lse = backend.selected_attention_forward(self.q, k, v, *tail, plan=self.plan)
        dout = self.draw(*out.shape)
        grads = backend.selected_attention_backward(dout, None, self.q, k, v, out, lse, *tail, plan=self.plan)
        exact = [x.double().requires_grad_() for x in (self.q, k, v)]
        expected, _ = reference.selected_attention(*exact, lists, self.geometry, self.cu, self.q_start, self.scale)
        self.errors["later"] = row_error(out, expected)
        for name, x, y in zip("qkv", grads, torch.autograd.grad(expected, exact, dout.double()), strict=True):
            self.errors[f"later d{name}"] = row_error(x, y)

    def whole(self, short_ranges: bool) -> None:
        """Compare the whole operator with its branches by the reference, for the blocks that it chose."""
        selected_forward_sm90.RANGE_ROWS, selected_forward_sm90.RANGE_BYTES = (1, 1) if short_ranges else RANGES
        B, S, Hkv, N = self.numbers
        D, used = self.q.shape[3], self.used
        k, v = self.draw(B, S, Hkv, D), self.draw(B, S, Hkv, self.value_size)
        inputs = (self.q, k, v, *self.compressed, *self.window, self.draw(*self.q.shape[:3], 3))
        constants = (self.cu, self.geometry.as_tuple(), self.scale)
        out, *saved = backend.attention_forward(*inputs, *constants, plan=self.plan)
        dout = self.draw(*out.shape)
        grads = backend.attention_backward(dout, *inputs, *saved, *constants, plan=self.plan)

        lengths = [N if name.endswith("cmp") else used for name in NAMES]
        exact = [x[:, :length].double().requires_grad_() for x, length in zip(inputs, lengths, strict=True)]
        q, k, v, k_cmp, v_cmp, k_win, v_win, gates = exact
        tail = (self.geometry, self.cu, 0)
        compressed, lse = reference.compressed_attention(q, k_cmp, v_cmp, *tail, self.scale)
        blocks = reference.select_blocks(q, k_cmp, lse, *tail, self.scale)
        self.errors["whole, blocks that differ"] = float((saved[-1][:, :used] != blocks).sum())
        branches = (
            compressed,
            reference.selected_attention(q, k, v, saved[-1][:, :used], *tail, self.scale)[0],
            reference.window_attention(q, k_win, v_win, *tail, 0, self.scale)[0],
        )
        expected = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
        self.errors["whole"] = row_error(out[:, :used], expected)
        outside = [out[:, used:].abs().sum()]
        wanted = torch.autograd.grad(expected, exact, dout[:, :used].double())
        for name, x, y, length in zip(NAMES, grads, wanted, lengths, strict=True):
            self.errors[f"whole d{name}"] = row_error(x[:, :length], y)
            outside.append(x[:, length:].abs().sum())
        self.errors["whole outside"] = float(sum(outside))
        self.planned = {f"{name}_kernel" for _, stage in self.plan.stages() for name in stage.kernels}


def main(word: str = "", seed: str = "", part: str = "0", num_parts: str = "1") -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    for name, case in list(CASES.items())[int(part) :: int(num_parts)]:
        for number in [int(seed)] if seed else SEEDS:
            if word in name:
                with emulate(number) as emulator:
                    inputs = Case(*case)
                    errors = inputs.run()
                errors["kernels planned, not run"] = float(len(inputs.planned - emulator.launched))
                line = {"case": name, "seed": number, "dtype": case[9], "errors": errors}
                print(json.dumps(line | {"kernels": sorted(emulator.launched)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
