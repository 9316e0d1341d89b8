"""A small measure of a machine, so that speeds of two runs are compared only where the machine was as fast both times.

fast = calibrate(torch.device("cpu"), num_threads=1)
print(fast.gflops, fast.gib_per_s)

Names do not tell machines apart: virtual ones say "AMD EPYC" for any generation, and a neighbour can take half of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nsa.units import GIB

ROUNDS = 7  # the best of which counts: others can only slow a round down
REPEATS = {"cpu": 3, "cuda": 50}  # of an operation in a round, so that a round takes some 20 ms
MATRIX = {"cpu": 512, "cuda": 4096}
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}  # more than fits into a cache


@dataclass(frozen=True)
class Calibration:
    """What a machine does when it has nothing else to do.

    Attributes:
        gflops: 1e9 operations per second of a matrix product in fp32.
        gib_per_s: GiB per second that a copy reads.
    """

    gflops: float
    gib_per_s: float

    def slower_percent(self, other: Calibration) -> float:
        """By how many percent this is slower than the other in what it has lost most in; negative if faster in both."""
        return 100 * (1 - min(self.gflops / other.gflops, self.gib_per_s / other.gib_per_s))

    def differs_percent(self, other: Calibration) -> float:
        """By how many percent the two differ in what they differ most in."""
        ratios = (self.gflops / other.gflops, self.gib_per_s / other.gib_per_s)
        return 100 * max(max(ratio, 1 / ratio) - 1 for ratio in ratios)

    def slowest(self, other: Calibration) -> Calibration:
        """The lesser of both measures each."""
        return Calibration(min(self.gflops, other.gflops), min(self.gib_per_s, other.gib_per_s))


def calibrate(device: torch.device, num_threads: int) -> Calibration:
    """Measure a device; takes about a second.

    Args:
        num_threads: of a CPU that compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        size, repeats = MATRIX[device.type], REPEATS[device.type]
        matrix = torch.full((size, size), 1 / size, device=device)
        product = torch.empty_like(matrix)
        source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product_s = _best_s(lambda: torch.mm(matrix, matrix, out=product), device, repeats)
        copy_s = _best_s(lambda: target.copy_(source), device, repeats)
    finally:
        torch.set_num_threads(before)
    return Calibration(gflops=2 * size**3 / product_s / 1e9, gib_per_s=source.numel() / copy_s / GIB)


def _best_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one of `repeats` calls in the best round."""
    best = float("inf")
    for _ in range(ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start_s) / repeats)
    return best
