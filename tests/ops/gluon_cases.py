"""Problems for Hopper's Gluon kernels, and their comparison with the reference while the emulator runs them.

Plain kernels around them run in the emulator too.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_cases import Sizes
from nsa.geometry import BlockGeometry
from nsa.ops import reference, triton as backend
from nsa.ops.call import AttentionInputs, Call
from nsa.ops.triton.dense import backward as dense_backward
from nsa.ops.triton.gpu import Device
from nsa.ops.triton.layout import make_layout
from nsa.ops.triton.plan import Plan, Shapes, make_plan
from nsa.ops.triton.selected import forward as selected_forward, forward_sm90 as selected_forward_sm90, union as unions

WIDE = BlockGeometry(8, 4, 16, 4, 1, 2, 150)
EDGE = BlockGeometry(8, 4, 16, 4, 1, 2, 127)  # intervals begin and end one from where a step does
BLOCKS = BlockGeometry(4, 2, 64, 4, 1, 1, 40)
ODD = BlockGeometry(8, 4, 48, 3, 1, 1, 40)
FEW = BlockGeometry(4, 2, 64, 2, 1, 1, 40)
FORCED = BlockGeometry(4, 2, 64, 6, 2, 3, 150)
BARE = BlockGeometry(4, 2, 64, 4, 0, 1, 40)  # no initial block


# Of Hopper's own kernels, those that a stage must run, whatever the case.
DENSE = {"dense_forward_sm90_kernel", "dense_dkdv_sm90_kernel", "dense_dq_sm90_kernel"}
UNIONS = {"union_forward_sm90_kernel", "union_dq_sm90_kernel"}
KERNELS = {
    "compressed": DENSE,
    "window": DENSE,
    "whole": DENSE | {"scores_sm90_kernel"},
    "unions": UNIONS,
    "later blocks": {"selected_backward_sm90_kernel"},
}


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """A problem for Hopper's kernels.

    Args:
        multiprocessors: of the device, which decides how programs share the work.
        stages: "compressed", "window", "whole" (the operator), "unions" (the selected branch by unions, for any lists)
            and "later blocks" (the selected branch for lists that hold blocks that a token does not see yet).
        by_unions: the selected branch of the whole operator is done by unions.
        small_scratch: the whole operator works on few tokens at a time.
        short_ranges: the selected branch works on short ranges of tokens.
    """

    multiprocessors: int = 2
    stages: Set[str] = frozenset({"compressed", "window"})
    by_unions: bool = False
    small_scratch: bool = False
    short_ranges: bool = False

    @property
    def kernels(self) -> set[str]:
        """Those of Hopper's own that must run."""
        names = set().union(*(KERNELS[stage] for stage in self.stages))
        if "whole" in self.stages and self.geometry.select_block_size == 64:
            names.add("selected_backward_sm90_kernel")
            if not self.by_unions:
                names.add("selected_forward_sm90_kernel")
            elif self.heads // self.groups >= 3:
                names |= UNIONS
        return names


CASES = {
    "batch of two, two groups": Case(batch=2, tokens=75, heads=8, groups=2, dtype=torch.bfloat16),
    "many steps": Case(tokens=230, geometry=WIDE, multiprocessors=1, stages={"window"}),
    "one head a group": Case(tokens=201, heads=1, geometry=EDGE, multiprocessors=1),
    "many heads a group, edges of steps": Case(tokens=18, heads=32, geometry=EDGE, q_start=256, k_start=130),
    "five heads a group": Case(batch=2, tokens=50, heads=5, multiprocessors=1),
    "head size 128": Case(tokens=70, heads=16, head_dim=128, dtype=torch.bfloat16),
    "keys of 192, values of 128": Case(tokens=70, heads=16, head_dim=192, value_head_dim=128, dtype=torch.bfloat16),
    "keys of 192, packed, three heads": Case(
        tokens=90, heads=3, head_dim=192, value_head_dim=128, documents=(0, 13, 80), multiprocessors=1,
    ),
    "rows in two splits": Case(tokens=90, heads=16, multiprocessors=3, stages={"compressed"}),
    "packed, empty and short documents": Case(tokens=120, documents=(0, 0, 51, 51, 54, 120), multiprocessors=1),
    "rows after the last document": Case(tokens=61, heads=8, documents=(0, 43), dtype=torch.bfloat16),
    "whole tiles after the last document": Case(
        tokens=200, groups=2, geometry=WIDE, documents=(0, 19), multiprocessors=3,
    ),
    "chunk of a prefill": Case(tokens=30, heads=8, groups=2, q_start=150, k_start=111, multiprocessors=1),
    "one token": Case(tokens=1, dtype=torch.bfloat16, multiprocessors=1),
    "whole": Case(tokens=420, heads=8, groups=2, geometry=BLOCKS, multiprocessors=3, stages={"whole"}),
    "whole, head size 128": Case(
        batch=2, tokens=330, heads=2, head_dim=128, geometry=BLOCKS, dtype=torch.bfloat16, multiprocessors=1,
        stages={"whole"},
    ),
    "whole, keys of 192": Case(tokens=400, head_dim=192, value_head_dim=128, geometry=BLOCKS, stages={"whole"}),
    "whole, packed, keys of 192, three heads": Case(
        tokens=330, heads=6, groups=2, head_dim=192, value_head_dim=128, geometry=BLOCKS, documents=(0, 0, 20, 320),
        dtype=torch.bfloat16, stages={"whole"}, small_scratch=True,
    ),
    "whole, unions, keys of 192": Case(
        tokens=230, heads=3, head_dim=192, value_head_dim=128, geometry=BLOCKS, stages={"whole"}, by_unions=True,
    ),
    "whole, blocks of 48 tokens": Case(tokens=190, geometry=ODD, stages={"whole"}),
    "whole, packed, five heads a group": Case(
        tokens=450, heads=5, geometry=BLOCKS, documents=(0, 0, 20, 440), stages={"whole"}, small_scratch=True,
    ),
    "whole, packed, four heads a group": Case(
        tokens=520, heads=8, groups=2, geometry=BLOCKS, documents=(0, 0, 20, 150, 151, 490), stages={"whole"},
        small_scratch=True,
    ),
    "whole, packed, one head a group": Case(
        tokens=420, heads=1, geometry=BLOCKS, documents=(0, 20, 410), stages={"whole"},
    ),
    "whole, packed, one head a group, no initial block": Case(
        tokens=600, heads=1, geometry=BARE, documents=(0, 3, 70, 72, 420, 590), stages={"whole"},
    ),
    "whole, many forced blocks, keys of 192": Case(
        tokens=450, heads=16, head_dim=192, value_head_dim=128, geometry=FORCED, documents=(0, 450),
        dtype=torch.bfloat16, stages={"whole"}, short_ranges=True,
    ),
    "whole, unions": Case(
        tokens=420, heads=8, groups=2, geometry=BLOCKS, multiprocessors=3, stages={"whole"}, by_unions=True,
    ),
    "whole, unions, packed, five heads a group": Case(
        tokens=350, heads=5, geometry=BLOCKS, documents=(0, 0, 20, 340), stages={"whole"}, by_unions=True,
    ),
    "whole, unions, small scratch": Case(
        tokens=330, groups=2, head_dim=128, geometry=BARE, documents=(0, 0, 20, 320), stages={"whole"}, by_unions=True,
        small_scratch=True,
    ),
    "whole, ranges, no initial block": Case(
        batch=2, tokens=500, groups=2, geometry=BARE, stages={"whole"}, small_scratch=True, short_ranges=True,
    ),
    "whole, 32 heads a group": Case(
        tokens=250, heads=32, geometry=BLOCKS, dtype=torch.bfloat16, stages={"whole"}, short_ranges=True,
    ),
    "lists with later blocks": Case(tokens=300, heads=2, geometry=BARE, stages={"later blocks"}),
    "unions, 16 heads a group": Case(tokens=190, heads=16, geometry=FEW, q_start=1300, stages={"unions"}),
    "unions, 32 heads a group, batch of two": Case(
        batch=2, tokens=31, heads=64, groups=2, geometry=FEW, q_start=1000, dtype=torch.bfloat16, multiprocessors=3,
        stages={"unions"},
    ),
    "unions, 64 heads a group": Case(
        tokens=40, heads=64, geometry=FEW, q_start=1279, multiprocessors=1, stages={"unions"},
    ),
    "unions, 6 heads a group, short documents": Case(
        tokens=310, heads=6, geometry=FEW, documents=(0, 3, 3, 67, 300), stages={"unions"},
    ),
    "unions, 4 heads a group": Case(tokens=120, heads=8, groups=2, geometry=FEW, q_start=850, stages={"unions"}),
    "unions, three heads a group, keys of 192": Case(
        tokens=230, heads=3, head_dim=192, value_head_dim=128, geometry=FEW, q_start=900, dtype=torch.bfloat16,
        stages={"unions"},
    ),
    "unions, 48 heads a group, keys of 192": Case(
        tokens=11, heads=48, head_dim=192, value_head_dim=128, geometry=FEW, q_start=1000, multiprocessors=1,
        stages={"unions"},
    ),
    "unions, no block twice": Case(
        tokens=6, heads=64, geometry=FEW, q_start=2000, dtype=torch.bfloat16, multiprocessors=1, stages={"unions"},
    ),
    "unions, head size 128": Case(
        tokens=61, heads=16, head_dim=128, geometry=FEW, documents=(0, 61), multiprocessors=1, stages={"unions"},
    ),
    "unions, a tile partly beyond the tokens": Case(
        tokens=70, heads=16, head_dim=128, geometry=FEW, q_start=500, dtype=torch.bfloat16, multiprocessors=5,
        stages={"unions"},
    ),
}  # fmt: skip
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


def imitate(case: Case, patch: pytest.MonkeyPatch) -> None:
    """Short ranges of tokens, where a case wants them."""
    if case.short_ranges:
        patch.setattr(selected_forward_sm90, "RANGE_ROWS", 1)
        patch.setattr(selected_forward_sm90, "RANGE_BYTES", 1)


def with_small_scratch(plan: Plan) -> Plan:
    """The plan with scratch for few tokens at a time."""
    topk = replace(plan.topk, choice=replace(plan.topk.choice, scratch_bytes=1))
    forward, backward = (
        replace(stage, scratch_bytes=2**18) for stage in (plan.selected.forward, plan.selected.backward)
    )
    return replace(plan, topk=topk, selected=replace(plan.selected, forward=forward, backward=backward))


class Comparison:
    """Inputs of one case and the errors of each of its stages."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        B, T, H, Hkv, D = case.batch, case.tokens, case.heads, case.groups, case.head_dim
        S, N = case.num_keys, case.num_compressed
        self.case, self.geometry, self.dtype = case, case.geometry, case.dtype
        self.q_start, self.k_start = case.q_start, case.k_start
        self.cu, self.used, self.value_size = case.cu_seqlens(), case.num_used, case.value_size
        self.q = self.draw(B, T, H, D)
        self.compressed = (self.draw(B, N, Hkv, D), self.draw(B, N, Hkv, self.value_size))
        self.window = (self.draw(B, S - case.k_start, Hkv, D), self.draw(B, S - case.k_start, Hkv, self.value_size))
        self.planned: set[str] = set()
        self.scale = (2 if "whole" in case.stages else 1) * D**-0.5
        self.errors: dict[str, float] = {}
        self.numbers = (B, S, Hkv, N)
        self.call = Call(self.geometry, self.scale, self.cu, case.q_start, case.k_start)
        sizes = (B, T, H, Hkv, D, self.value_size, self.dtype, self.geometry)
        shapes = Shapes(*sizes, B if case.documents is None else len(case.documents) - 1, N, case.q_start)
        device = Device((9, 0), 232448, case.multiprocessors, total_memory=2**40)
        self.plan = make_plan(shapes, device, unions=case.by_unions)
        if case.small_scratch:
            self.plan = with_small_scratch(self.plan)
        self.by_union = make_plan(shapes, device, unions=True).selected

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def run(self) -> dict[str, float]:
        if "compressed" in self.case.stages:
            self.branch("compressed_attention", *self.compressed, (self.q_start, self.scale))
        if "window" in self.case.stages:
            self.branch("window_attention", *self.window, (self.q_start, self.k_start, self.scale))
        if "unions" in self.case.stages:
            self.unions()
        if "whole" in self.case.stages:
            self.whole()
        if "later blocks" in self.case.stages:
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
        out, lse = getattr(backend, f"{name}_forward")(*inputs, self.call, plan=self.plan)
        self.errors[f"{name} out"] = row_error(out[:, :used], expected[0])
        self.errors[f"{name} lse"] = row_error(lse[:, :used], expected[1])
        outside = [out[:, used:].abs().sum(), torch.isfinite(lse[:, used:]).sum()]

        # The gradients of rows outside any document must not leak into the keys.
        dout, dlse = self.draw(*out.shape), torch.where(torch.isfinite(lse), torch.randn(lse.shape), 0.0)
        grads = getattr(backend, f"{name}_backward")(dout, dlse, *inputs, out, lse, self.call, plan=self.plan)
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
        tail = (lists, self.call)
        out, lse = backend.selected_attention_forward(self.q, k, v, *tail, plan=self.plan)
        dout = self.draw(*out.shape)
        grads = backend.selected_attention_backward(dout, None, self.q, k, v, out, lse, *tail, plan=self.plan)
        exact = [x.double().requires_grad_() for x in (self.q, k, v)]
        expected, _ = reference.selected_attention(*exact, lists, self.geometry, self.cu, self.q_start, self.scale)
        self.errors["later"] = row_error(out, expected)
        for name, x, y in zip("qkv", grads, torch.autograd.grad(expected, exact, dout.double()), strict=True):
            self.errors[f"later d{name}"] = row_error(x, y)

    def whole(self) -> None:
        """Compare the whole operator with its branches by the reference, for the blocks that it chose."""
        B, S, Hkv, N = self.numbers
        D, used = self.q.shape[3], self.used
        k, v = self.draw(B, S, Hkv, D), self.draw(B, S, Hkv, self.value_size)
        inputs = AttentionInputs(self.q, k, v, *self.compressed, *self.window, self.draw(*self.q.shape[:3], 3))
        out, saved = backend.attention_forward(inputs, self.call, plan=self.plan)
        dout = self.draw(*out.shape)
        grads = backend.attention_backward(dout, inputs, saved, self.call, plan=self.plan)

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
