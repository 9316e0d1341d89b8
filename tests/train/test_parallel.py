"""Processes of one run: they agree, a lost one ends the others, and a wrong start is explained."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from nsa.device import choose_device
from nsa.train.parallel import one_process, setup_parallel
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


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine that seems to have two GPUs; gives what is asked of CUDA and of the process group."""
    calls: list[Any] = []
    current = [0]

    def set_device(device: torch.device) -> None:
        calls.append(device)
        current[0] = device.index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return calls


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_takes_the_gpu_of_its_local_rank(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    with setup_parallel(name, timeout_s=60) as parallel:
        assert (parallel.rank, parallel.device, parallel.mode) == (3, torch.device("cuda", 1), "ddp")
        assert choose_device(name) == parallel.device
    group = (("cpu:gloo,cuda:nccl",), {"timeout": timedelta(seconds=60)})
    assert two_gpus == [torch.device("cuda", 1), group]


@pytest.mark.parametrize(
    ("name", "local_rank", "message"),
    [("cuda:1", "1", "'cuda:1' is one GPU for several processes"), ("cuda", "2", "local rank 2 has no GPU: 2 CUDA")],
)
def test_ranks_that_cannot_have_a_gpu_of_their_own_are_refused(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, local_rank: str, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=message):
        setup_parallel(name).__enter__()
    assert two_gpus == []


def test_one_process_takes_the_gpu_that_is_named(two_gpus: list[Any]) -> None:
    assert one_process("auto").device == torch.device("cuda", 0)
    assert one_process("cuda:1").device == torch.device("cuda", 1)
    assert one_process("cuda").device == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 1)]
