"""Time the kernels of the Triton backend and their variants, stage by stage, and hold each against the plain one.

    PYTHONPATH=src python3 benchmarks/tune_kernels.py --lengths 8192 65536 --num_heads 64 --num_kv_heads 4

For who changes a kernel or brings a new GPU: the constants in `src/nsa/ops/triton/` come from such runs. Each line is a
stage, a variant, its median milliseconds and how far its results are from the plain kernels' (largest error of a row
over the rows' root mean square). A variant that fails says why, and the others are timed all the same. It takes a
Hopper GPU, for the variants that are Hopper's own.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nsa.bench.protocol import median_ms
from nsa.geometry import BlockGeometry
from nsa.ops.triton import compress
from nsa.ops.triton.dense import backward as dense_backward, forced, forward as dense_forward
from nsa.ops.triton.gpu import read_device
from nsa.ops.triton.plan import Plan, Shapes, Stage, TopK, make_plan
from nsa.ops.triton.selected import (
    backward as selected_backward,
    forward as selected_forward,
    forward_sm90 as selected_forward_sm90,
    union,
)
from nsa.ops.triton.tiles import choice_tile
from nsa.ops.triton.topk import choice

Patch = tuple[Any, str, Any]
Run = Callable[[], tuple[Tensor, ...]]


@contextmanager
def patched(patches: tuple[Patch, ...]) -> Iterator[None]:
    """Constants of modules at other values."""
    before = [getattr(module, name) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(patches, before, strict=True):
            setattr(module, name, value)


def row_error(x: Tensor, expected: Tensor) -> float:
    difference = (x.float() - expected.float()).norm(dim=-1).max()
    return float(difference / expected.float().norm(dim=-1).square().mean().sqrt())


def scores_tiles(q: Tensor, num_kv_heads: int) -> Iterator[dict[str, int]]:
    """Tiles of the scores: 64 to 256 columns."""
    heads = triton.next_power_of_2(q.shape[2] // num_kv_heads)
    for columns, stages in product((64, 128, 256), (2, 3)):
        if columns >= heads:
            yield {"HEADS": heads, "TOKENS": columns // heads, "BLOCK_N": 64, "num_warps": 4, "num_stages": stages}


class Stages:
    """Inputs of every stage, and its variants."""

    def __init__(self, T: int, H: int, Hkv: int, D: int, value_size: int) -> None:
        torch.manual_seed(0)
        self.geometry, self.scale, self.window = BlockGeometry(), D**-0.5, BlockGeometry().window_size

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.q, self.k, self.v = draw(1, T, H, D), draw(1, T, Hkv, D), draw(1, T, Hkv, value_size)
        self.dout = draw(1, T, H, value_size)
        count = self.geometry.num_compressed(T)
        self.k_cmp, self.v_cmp = (compress.mean_pool(x, self.geometry, None, count) for x in (self.k, self.v))
        shapes = Shapes(1, T, H, Hkv, D, value_size, torch.bfloat16, self.geometry, num_docs=1, num_compressed=count)
        device = read_device(self.q.device)
        # Without Hopper's own kernels: what another GPU of the same memory would run.
        plain, own = (device._replace(capability=capability) for capability in ((8, 0), device.capability))
        self.plain, self.own = (make_plan(shapes, x, unions=False) for x in (plain, own))
        self.plain_unions, self.own_unions = (make_plan(shapes, x, unions=True) for x in (plain, own))
        self.cmp, self.win = self.compressed(self.plain), self.windowed(self.plain)
        self.blocks = self.choose(self.plain.topk)[0]
        self.slc = self.selected(self.plain)
        self.flash: Tensor | None = None

    def rows(self, result: tuple[Tensor, ...]) -> dense_backward.Rows:
        return dense_backward.Rows(result[1], dense_backward.make_delta(result[0], self.dout, None))

    def compressed(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.q, self.k_cmp, self.v_cmp, self.geometry, None, 0, 0, 0, self.scale)
        return dense_forward.dense_forward(*what, plan.compressed.forward)

    def windowed(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.q, self.k, self.v, self.geometry, None, self.window, 0, 0, self.scale)
        return dense_forward.dense_forward(*what, plan.window.forward)

    def choose(self, plan: TopK) -> tuple[Tensor, ...]:
        what = (self.q, self.k_cmp, self.cmp[1], self.geometry, None, 0, self.scale)
        return (choice.select_blocks(*what, plan),)

    def selected(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.q, self.k, self.v)
        tail = (self.geometry, None, 0, self.scale)
        if plan.selected.forced is None:
            return union.union_forward(*what, self.blocks, *tail, plan.selected.forward)
        known = forced.forced_forward(*what, *tail, plan.selected.forced)
        return selected_forward.select_forward(*what, self.blocks, *tail, plan.selected.forward, known)

    def compressed_backward(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.geometry, None, 0, 0, 0, self.scale, plan.compressed)
        return dense_backward.dense_backward(self.dout, self.q, self.k_cmp, self.v_cmp, self.rows(self.cmp), *what)

    def window_backward(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.geometry, None, self.window, 0, 0, self.scale, plan.window)
        return dense_backward.dense_backward(self.dout, self.q, self.k, self.v, self.rows(self.win), *what)

    def flash_window(self) -> tuple[Tensor, ...]:
        """The window by PyTorch's own FlashAttention."""
        T = self.q.shape[1]
        bounds = torch.tensor([0, T], dtype=torch.int32, device="cuda")
        inputs = (self.q[0], self.k[0], self.v[0])
        return (varlen_attn(*inputs, bounds, bounds, T, T, window_size=(self.window - 1, 0))[None],)  # pyright: ignore

    def flash_window_backward(self) -> tuple[Tensor, ...]:
        if self.flash is None:
            given = self.q, self.k, self.v
            self.q, self.k, self.v = self.inputs = tuple(x.detach().requires_grad_() for x in given)
            self.flash = self.flash_window()[0]
            self.q, self.k, self.v = given
        return torch.autograd.grad(self.flash, self.inputs, self.dout, retain_graph=True)

    def selected_backward(self, plan: Plan) -> tuple[Tensor, ...]:
        what = (self.dout, self.q, self.k, self.v, self.rows(self.slc), self.blocks, self.geometry, None, 0, self.scale)
        dq = None
        if plan.selected.dq:
            dq = union.union_dq(*what, plan.selected.dq, torch.zeros_like(self.q))
        return selected_backward.select_backward(*what, plan.selected, dq)

    def variants(self) -> dict[str, dict[str, tuple[tuple[Patch, ...], Run]]]:
        """stage -> variant -> constants and function; the first variant is the plain one."""
        found: dict[str, Any] = {}
        for stage, run in (
            ("compressed forward", self.compressed),
            ("window forward", self.windowed),
            ("choice", lambda plan: self.choose(plan.topk)),
            ("selected forward", self.selected),
            ("compressed backward", self.compressed_backward),
            ("window backward", self.window_backward),
            ("selected backward", self.selected_backward),
        ):
            found[stage] = {"plain": ((), partial(run, self.plain)), "Hopper's": ((), partial(run, self.own))}
        found["choice"] |= {name: ((), partial(self.choose, plan)) for name, plan in self.choices()}
        selected = found["selected forward"]
        for stages, elements in ((2, 1024), (4, 1024), (4, 2048), (6, 512), (6, 1024), (6, 2048)):
            patch = ((selected_forward, "REDUCE_STAGES", stages), (selected_forward, "REDUCE_ELEMENTS", elements))
            name = f"{stages} slots on their way, {elements} elements a program of the sum"
            selected[name] = (patch, partial(self.selected, self.own))
        for rows in (16, 64):
            patch = ((selected_forward_sm90, "RANGE_ROWS", rows),)
            selected[f"ranges of {rows} rows a block"] = (patch, partial(self.selected, self.own))
        for mib in (512, 1024):
            stage = replace(self.own.selected.forward, scratch_bytes=mib * 2**20)
            plan = replace(self.own, selected=replace(self.own.selected, forward=stage))
            selected[f"{mib} MiB of scratch"] = ((), partial(self.selected, plan))
        backward = found["selected backward"]
        for mib in (768, 1536, 3072):
            stage = replace(self.own.selected.backward, scratch_bytes=mib * 2**20)
            plan = replace(self.own, selected=replace(self.own.selected, backward=stage))
            backward[f"{mib} MiB of scratch"] = ((), partial(self.selected_backward, plan))
        for keys, deep in product((4, 8, 16), (1, 3, 4, 6)):
            patch = ((selected_backward, "KEYS_OF_SUM", keys), (selected_backward, "STAGES_OF_SUM", deep))
            name = f"{keys} keys of {deep} items a program of the sum"
            backward[name] = (patch, partial(self.selected_backward, self.own))
        for rows in (1024, 2048, 4096, 8192):
            patch = ((selected_backward, "rows_of_item", lambda _, rows=rows: rows),)
            backward[f"{rows} rows an item"] = (patch, partial(self.selected_backward, self.own))
        found["window forward"]["PyTorch's FlashAttention"] = ((), self.flash_window)
        found["window backward"]["PyTorch's FlashAttention"] = ((), self.flash_window_backward)
        if self.q.shape[1] <= 32768:  # beyond, unions are long
            selected["union, plain"] = ((), partial(self.selected, self.plain_unions))
            selected["union"] = ((), partial(self.selected, self.own_unions))
            backward["union, plain dQ"] = ((), partial(self.selected_backward, self.plain_unions))
            backward["union"] = ((), partial(self.selected_backward, self.own_unions))
        return found

    def choices(self) -> Iterator[tuple[str, TopK]]:
        """The choice of blocks with other tiles of the plain scores, and of the choice itself."""
        topk, reason = self.own.topk, "a variant"
        for tile in scores_tiles(self.q, self.k.shape[2]):
            yield str(tile), replace(self.plain.topk, scores=Stage(("scores",), tile, reason))
        num_blocks = self.geometry.num_select_blocks(self.q.shape[1])
        for what in ({"max_chunk": 512}, {"whole": 128}, {"whole": 512}, {"slack": 0}, {"slack": 4}, {"registers": 72}):
            tile = choice_tile(self.geometry, num_blocks, **what)
            yield str(what), replace(topk, choice=replace(topk.choice, tile=tile))


def measure(stages: Stages, length: int, repeats: int, only: str) -> list[dict[str, Any]]:
    lines = []
    for stage, variants in stages.variants().items():
        if only not in stage:
            continue
        expected = next(iter(variants.values()))[1]()
        ready: dict[str, Any] = {}
        errors: dict[str, float] = {}
        for name, (patch, run) in variants.items():

            def step(patch: tuple[Patch, ...] = patch, run: Callable[[], Any] = run) -> Any:
                with patched(patch):
                    return run()

            try:
                result = step()
                pairs = [(x, y) for x, y in zip(result, expected, strict=False) if y.dim() == 4]
                errors[name] = max(row_error(x, y) for x, y in pairs)
                ready[name] = {"run": step}
            except Exception as error:  # noqa: BLE001
                print(f"{stage}, {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
        times = median_ms(ready, torch.device("cuda"), 2, repeats, ahead=True)
        for name in ready:
            line = {"length": length, "stage": stage, "variant": name, "ms": round(times[f"{name}_run"], 4)}
            lines.append(line | {"row_error": round(errors[name], 5)})
            print(*lines[-1].values(), sep=" | ", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536], help="tokens")
    parser.add_argument("--num_heads", type=int, default=64, help="query heads")
    parser.add_argument("--num_kv_heads", type=int, default=4, help="key/value heads")
    parser.add_argument("--head_dim", type=int, default=128, help="size of a query and key head")
    parser.add_argument("--value_head_dim", type=int, help="size of a value head; that of keys by default")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--only", default="", help="a word of the stages to measure")
    parser.add_argument("--out", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    lines = []
    for length in arguments.lengths:
        sizes = (arguments.head_dim, arguments.value_head_dim or arguments.head_dim)
        stages = Stages(length, arguments.num_heads, arguments.num_kv_heads, *sizes)
        lines += measure(stages, length, arguments.repeats, arguments.only)
        del stages
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
