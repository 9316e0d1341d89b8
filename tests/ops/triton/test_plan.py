"""The plan: which kernels run for which shapes on which GPU, that no others run, and that the report prints it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from nsa import BlockGeometry
from nsa.ops import routing, triton as backend
from nsa.ops.call import AttentionInputs, Call
from nsa.ops.triton.gpu import Device, read_device
from nsa.ops.triton.plan import Plan, Shapes, make_plan, plan_call

H200 = Device((9, 0), 232448, 132, 150 * 10**9)
A100 = Device((8, 0), 166912, 108, 80 * 10**9)
L4 = Device((8, 9), 101376, 58, 24 * 10**9)
B200 = Device((10, 0), 232448, 148, 190 * 10**9)
PAPER = BlockGeometry()


def shapes(
    T: int = 8192, G: int = 16, Hkv: int = 4, Dk: int = 128, Dv: int = 128, dtype: torch.dtype = torch.bfloat16,
    geometry: BlockGeometry = PAPER, batch: int = 1, num_docs: int | None = None, q_start: int = 0,
) -> Shapes:  # fmt: skip
    num_compressed = geometry.num_compressed(T + q_start)
    sizes = (batch, T, G * Hkv, Hkv, Dk, Dv, dtype, geometry)
    return Shapes(*sizes, batch if num_docs is None else num_docs, num_compressed, q_start)


def main_kernels(plan: Plan) -> dict[str, str]:
    return {name: stage.kernels[0] for name, stage in plan.stages()}


def test_hopper_runs_its_own_kernels_and_others_the_plain_ones():
    by_block = {
        "compressed forward": "dense_forward", "compressed backward, keys": "dense_dkdv",
        "compressed backward, queries": "dense_dq", "window forward": "dense_forward",
        "window backward, keys": "dense_dkdv", "window backward, queries": "dense_dq", "scores of blocks": "scores",
        "choice of blocks": "choice", "selected forward, forced blocks": "forced_forward",
        "selected forward and gated sum": "selected_forward", "selected backward": "selected_backward",
        "gates backward": "gate_backward",
    }  # fmt: skip
    for device in (A100, L4, B200):
        assert main_kernels(make_plan(shapes(65536), device)) == by_block
    own = {name: f"{kernel}_sm90" for name, kernel in by_block.items()}
    own["selected forward, forced blocks"] = "dense_forward_sm90"
    own |= {name: by_block[name] for name in ("choice of blocks", "gates backward")}
    assert main_kernels(make_plan(shapes(65536), H200)) == own
    assert main_kernels(make_plan(shapes(65536, dtype=torch.float32), H200)) == by_block


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({"Dk": 192}, "dense scores forced selected"),
        ({"Dk": 192, "G": 3}, "dense scores selected"),
        ({"Dk": 192, "G": 1}, "dense forced selected"),
        ({"Dk": 64, "Dv": 64, "G": 1}, "dense scores forced selected"),
        ({"Dk": 64, "Dv": 60}, "dense scores forced selected"),
        ({"G": 48}, "dense forced selected"),
        ({"Dk": 128, "Dv": 64}, "scores"),
        ({"Dk": 96, "Dv": 96}, ""),
        ({"geometry": BlockGeometry(32, 16, 128, 8)}, "dense scores forced"),
    ],
    ids=str,
)
def test_what_hoppers_own_kernels_take(sizes, stages):
    plan = make_plan(shapes(65536, **sizes), H200, unions=False)
    assert plan.selected.forced is not None
    found = {
        "dense": plan.window.forward, "scores": plan.topk.scores, "forced": plan.selected.forced,
        "selected": plan.selected.forward,
    }  # fmt: skip
    assert [name for name, stage in found.items() if stage.is_sm90] == stages.split()
    for branch in (plan.compressed, plan.window):
        assert {branch.forward.is_sm90, branch.dkdv.is_sm90, branch.dq.is_sm90} == {"dense" in stages}
    assert plan.selected.backward.is_sm90 == ("selected" in stages.split())


def test_unions_run_where_neighbours_choose_from_few_blocks():
    """Short input, or long input of short documents; dQ by unions pays later than the forward."""

    def unions(device: Device, **sizes) -> tuple[bool, bool]:
        selected = make_plan(shapes(**sizes), device).selected
        assert (selected.forced is None) == ("union" in selected.forward.kernels)
        return selected.forced is None, selected.dq is not None

    for device in (H200, A100, L4):
        assert unions(device, T=2048, G=6)[0]
        assert unions(device, T=65536, G=6) == (False, False)
        assert unions(device, T=65536, G=6, num_docs=32)[0]
        assert unions(device, T=2**20, G=6) == (False, False)
    assert unions(H200, T=1024) == (True, True)
    assert unions(H200, T=1024, Dk=64, Dv=64) == (True, False)
    assert unions(A100, T=1024, Dk=64, Dv=64) == (True, True)
    assert unions(H200, T=8192)[0]
    assert not unions(A100, T=65536, G=128)[0]  # no tile of 64 rows holds a token


def test_what_the_selected_stage_alone_runs_takes_any_lists():
    for device, given in product((H200, L4), (None, False, True)):
        listed = make_plan(shapes(1024), device, given).listed
        assert listed.forced is None
        assert listed.dq is None
        assert listed.forward.kernels == ("selected_forward", "selected_reduce")
        assert "selected_dq_reduce" in listed.backward.kernels


def test_unions_can_be_asked_for():
    assert make_plan(shapes(65536), H200, unions=True).selected.dq is not None
    assert make_plan(shapes(1024), H200, unions=False).selected.dq is None


def test_tiles_fit_the_memory_and_the_group():
    assert make_plan(shapes(), A100).window.forward.tile == make_plan(shapes(), L4).window.forward.tile
    assert make_plan(shapes(), B200).window.forward.tile["num_stages"] == 3
    assert make_plan(shapes(G=6), A100).window.dkdv.tile["TMA"] is False
    assert make_plan(shapes(G=8), A100).window.dkdv.tile["TMA"] is True
    assert make_plan(shapes(G=48), A100, unions=True).selected.forward.tile["BLOCK_M"] == 64
    assert make_plan(shapes(G=5), A100, unions=True).selected.forward.tile["TOKENS"] == 12
    assert make_plan(shapes(), H200).window.forward.tile == {"programs": 132}


def test_scratch_is_a_share_of_small_memories():
    small = L4._replace(total_memory=6 * 10**9)
    stages = make_plan(shapes(65536), small)
    assert stages.topk.choice.scratch_bytes == stages.selected.backward.scratch_bytes == 10**8
    assert make_plan(shapes(65536), H200).topk.choice.scratch_bytes == 2**31


def test_few_compressed_keys_split_the_rows():
    assert make_plan(shapes(65536, G=16, Hkv=1), H200).compressed.splits > 1
    assert make_plan(shapes(65536, G=16, Hkv=1), H200).window.splits == 1
    assert make_plan(shapes(16), H200).compressed.splits == 1  # no compressed key at all


def test_a_head_beyond_the_largest_tile_is_an_error():
    with pytest.raises(ValueError, match="head sizes up to 256, not 257"):
        make_plan(shapes(Dk=257), H200)


SMALL = BlockGeometry(8, 4, 64, 4, 1, 2, 24)
VOCABULARY = {
    f"{name}_kernel"
    for device, unions, group in product((H200, A100), (False, True), (1, 4))
    for _, stage in make_plan(shapes(G=group), device, unions).stages()
    for name in stage.kernels
}


@pytest.mark.parametrize("unions", [False, True])
@pytest.mark.parametrize("device", [H200, A100, L4], ids=["H200", "A100", "L4"])
def test_what_is_planned_is_launched_and_nothing_else(device, unions, monkeypatch):
    launched: dict[str, list[dict]] = {}

    def record(self: JITFunction, *args, grid, warmup, **options) -> None:
        launched.setdefault(self.__name__, []).append(options)

    monkeypatch.setattr(JITFunction, "run", record)
    what = shapes(300, G=4, Hkv=2, Dk=64, Dv=64, geometry=SMALL)
    plan = make_plan(what, device, unions)
    q, k, v = (torch.zeros(1, 300, heads, 64, dtype=what.dtype) for heads in (8, 2, 2))
    k_cmp, v_cmp = (x[:, : what.num_compressed].contiguous() for x in (k, v))
    inputs = AttentionInputs(q, k, v, k_cmp, v_cmp, k, v, q[..., :3].contiguous())
    out, branches = backend.attention_forward(inputs, Call(SMALL, 1.0), plan)
    backend.attention_backward(out, inputs, branches, Call(SMALL, 1.0), plan)
    planned = {f"{name}_kernel" for _, stage in plan.stages() for name in stage.kernels}
    assert planned == launched.keys() & VOCABULARY
    for _, stage in plan.stages():
        tile = {name: value for name, value in stage.tile.items() if name not in ("programs", "TOKENS")}
        assert any(tile.items() <= options.items() for options in launched[f"{stage.kernels[0]}_kernel"])


def test_another_tile_of_a_plan_is_what_is_launched(monkeypatch):
    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, grid, warmup, **options: launches.append(options))
    plan = make_plan(shapes(100, Dk=64, Dv=64, geometry=SMALL), H200)
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}
    plan = replace(plan, window=replace(plan.window, forward=replace(plan.window.forward, kernels=("dense_forward",))))
    plan = replace(plan, window=replace(plan.window, forward=replace(plan.window.forward, tile=tile)))
    q = torch.zeros(1, 100, 64, 64, dtype=torch.bfloat16)
    backend.window_attention_forward(q, q[:, :, :4], q[:, :, :4], Call(SMALL, 1.0), plan)
    assert tile.items() <= launches[-1].items()


def test_the_report_prints_the_plan(monkeypatch):
    monkeypatch.setattr(routing, "_why_not_triton", lambda *_: None)
    q, k, v = (torch.zeros(1, 1000, heads, 40) for heads in (6, 1, 1))
    report = routing.routing_report(q, k, v, PAPER)
    plan = plan_call(q, k, v, PAPER, None, num_compressed=PAPER.num_compressed(1000))
    assert plan == make_plan(shapes(1000, 6, 1, 40, 40, torch.float32), read_device(q.device))
    stages = [(name, ", ".join(stage.kernels), stage.tile, stage.reason) for name, stage in plan.stages()]
    assert [(route.stage, route.kernels, route.tile, route.reason) for route in report.stages] == stages
    assert all(text in str(report) for text in ("dense_dkdv", "block_m=16", "padded to 48/64"))
