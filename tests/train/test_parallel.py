"""Processes of one run: they agree, a lost one ends the others, and a wrong start is explained."""

from __future__ import annotations

import pytest
import torch

from nsa.train.parallel import setup_parallel
from ranks import RankFailure, run_ranks

AGREE = """
with setup_parallel("cpu", "auto", timeout_s=60) as parallel:
    values = torch.tensor([1.0, 2.0]) * (parallel.rank + 1)
    report({
        "is_main": parallel.is_main,
        "mode": parallel.mode,
        "device": str(parallel.device),
        "any": [parallel.any(flags[parallel.rank]) for flags in ((False, False), (False, True), (True, True))],
        "sum": parallel.sum(values).tolist(),
        "values": values.tolist(),
        "broadcast": parallel.broadcast({"from": parallel.rank}),
    })
    parallel.barrier()
"""


def test_two_ranks_agree() -> None:
    first, second = run_ranks(AGREE)
    assert (first["is_main"], second["is_main"]) == (True, False)
    for seen in (first, second):
        assert (seen["mode"], seen["device"]) == ("ddp", "cpu")
        assert seen["any"] == [False, True, True]
        assert seen["sum"] == [3.0, 6.0]
        assert seen["broadcast"] == {"from": 0}
    assert second["values"] == [2.0, 4.0]


def test_a_rank_that_fails_ends_the_others_and_says_which_it_was() -> None:
    body = """
    with setup_parallel("cpu", timeout_s=60) as parallel:
        if parallel.rank == 1:
            raise RuntimeError("a lost disk")
        parallel.barrier()
    """
    with pytest.raises(RankFailure) as caught:
        run_ranks(body, timeout_s=50)
    assert all(caught.value.codes)
    assert "a lost disk" in caught.value.errors[1]
    assert "this was rank 1 of 2" in caught.value.errors[1]


def test_one_process_needs_no_group() -> None:
    with setup_parallel("cpu", "fsdp2") as parallel:
        assert (parallel.rank, parallel.world_size, parallel.mode, parallel.is_main) == (0, 1, "none", True)
        assert parallel.device == torch.device("cpu")
        assert not parallel.any(False)
        assert parallel.broadcast("x") == "x"
        values = torch.ones(2)
        assert parallel.sum(values) is values
        parallel.barrier()
        assert not torch.distributed.is_initialized()


def test_several_processes_need_a_way_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"train\.parallel is 'none' but torchrun started 2 processes"):
        setup_parallel("cpu", "none").__enter__()
