"""One decode step of attention under a CUDA graph, NSA on a paged cache against dense attention, on a GPU.

    python benchmarks/decode_step.py --out benchmarks/results/decode_step_h200.csv

Each shape has 4 GiB of keys and values unless it is of one row; of those there are several caches, so that none stays
in the L2 cache. Dense attention is PyTorch's, with the heads of a group as its queries: cuDNN and FlashAttention. All
three are replayed in turns in one process.

CSV columns: query and key/value heads, rows, context; `nsa_ms`, `cudnn_ms`, `flash_ms` for one layer; `over_cudnn`,
`over_flash` how many times as fast; `<kernel>_us` of each kernel alone; `read_mib` that the step must read, and
`gb_per_s` of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from nsa import BlockGeometry, PagedView, paged_decode
from nsa.bench.protocol import print_table, write_results

GEOMETRY = BlockGeometry()
KERNELS = ("compressed", "importance", "choice_window", "selected", "merge")
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Query heads, key/value heads, rows, context.
SHAPES = (
    (64, 4, 32, 65536), (64, 4, 64, 32768), (64, 4, 256, 8192), (32, 8, 16, 65536), (64, 4, 1, 65536), (64, 4, 1, 8192),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Head size of keys and values, and how often each graph is replayed; the results are medians."""

    head_dim: int = 128
    warmup: int = 5
    repeats: int = 30


@dataclass(frozen=True)
class Row:
    """One shape; see the CSV columns above."""

    num_heads: int
    num_kv_heads: int
    rows: int
    context: int
    nsa_ms: float
    cudnn_ms: float
    flash_ms: float
    over_cudnn: float
    over_flash: float
    compressed_us: float
    importance_us: float
    choice_window_us: float
    selected_us: float
    merge_us: float
    read_mib: float
    gb_per_s: float


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after two calls that compile its kernels."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def medians_ms(graphs: dict[str, torch.cuda.CUDAGraph], settings: Settings) -> dict[str, float]:
    """Milliseconds of each graph, replayed in turns; each once untimed before it is timed."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(settings.warmup + settings.repeats):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values[settings.warmup :]) for name, values in times.items()}


def kernel_us(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
    """Median microseconds of each kernel of a graph."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    for event in profiler.events():
        for name in KERNELS:
            if f"decode_{name}_kernel" in event.name:
                found[name].append(event.device_time)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(shape: tuple[int, int, int, int], settings: Settings) -> Row:
    """NSA and dense attention at one shape, all rows at the full context."""
    heads, groups, rows, context = shape
    size, block = settings.head_dim, GEOMETRY.select_block_size
    num_caches, pages = (8 if rows == 1 else 1), rows * context // block
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(rows, 1, heads, size, **options)
    gates = torch.rand(rows, 1, heads, 3, **options)
    table = torch.arange(pages, dtype=torch.int32, device="cuda").view(rows, -1)
    lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    stores = [
        [
            torch.randn(pages, groups, tokens, size, **options)
            for tokens in (block, block, *2 * (GEOMETRY.strides_per_select,))
        ]
        for _ in range(num_caches)
    ]
    views = [PagedView(*store, table, lengths) for store in stores]
    graphs = {"nsa": captured(lambda: [paged_decode(q, view, gates, GEOMETRY, backend="triton") for view in views])}
    query = q.view(rows, groups, heads // groups, size)
    dense = [[x.view(rows, groups, context, size) for x in store[:2]] for store in stores]
    for name, kind in DENSE.items():
        with sdpa_kernel(kind):
            graphs[name] = captured(lambda: [scaled_dot_product_attention(query, k, v) for k, v in dense])
    ms = {name: value / num_caches for name, value in medians_ms(graphs, settings).items()}
    tokens = GEOMETRY.num_compressed(context) + GEOMETRY.num_selected_blocks * block + GEOMETRY.window_size
    read = rows * groups * tokens * 2 * size * q.element_size()
    return Row(
        *shape, ms["nsa"], ms["cudnn"], ms["flash"], ms["cudnn"] / ms["nsa"], ms["flash"] / ms["nsa"],
        *kernel_us(graphs["nsa"]).values(), read / 2**20, read / ms["nsa"] / 1e6,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file; nothing is written unless given")
    out = parser.parse_args().out
    torch.manual_seed(0)
    settings, results = Settings(), []
    for shape in SHAPES:
        results.append(measure(shape, settings))
        torch.cuda.empty_cache()
    print_table(results, "One decode step of attention")
    if out is not None:
        command = " ".join(["python", *sys.argv])
        write_results(results, out, settings, command, torch.device("cuda"))


if __name__ == "__main__":
    main()
