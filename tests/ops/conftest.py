"""A process in which Triton's kernels run in its interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def in_interpreter() -> Iterator[Callable[..., Any]]:
    """Calls a function of a module in a process of its own, since TRITON_INTERPRET is read when kernels are defined.

    Its start takes as long as several cases, so that it serves all tests of a worker.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result()  # starts it
        yield lambda function, *arguments: process.submit(function, *arguments).result()
