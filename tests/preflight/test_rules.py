"""Each rule of preflight finds its problem, and only that."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsa.config.findings import CODES, NOT_OVERRIDABLE, check_allowed
from nsa.config.run import RunConfig
from nsa.machine import Machine, machine_named
from nsa.preflight.estimate import Memory, Speed
from nsa.preflight.rules import Plan, check

CPU = Machine("a CPU", "cpu", 16.0, False, False, False, None)
GPU = machine_named("h200")
OLD_GPU = replace(GPU, name="an old GPU", has_fast_bf16=False, has_triton=False)
LONG = {"steps": 50_000}
# A window and a selection that leave most of 512 tokens out.
SPARSE = {"num_selected_blocks": 4, "window_size": 64}


def plan(machine: Machine | None = CPU, **sections: dict[str, Any]) -> Plan:
    """A run of a sound config with some keys changed."""
    sections = {name: dict(values) for name, values in sections.items()}
    facts = sections.pop("facts", {})
    sections["model"] = SPARSE | sections.get("model", {})
    return replace(Plan(RunConfig.model_validate(sections), machine, 1, vocab_size=259), **facts)


def memory(activations_gib: float) -> dict[str, Memory]:
    return {"memory": Memory(0.1, 0.1, 0.2, activations_gib, 0.6)}


def found(subject: Plan) -> dict[str, str]:
    """Code -> level of what the rules find."""
    return {finding.code: finding.level for finding in check(subject)}


def test_a_sound_run_has_no_findings() -> None:
    assert found(plan()) == {}
    assert found(plan(GPU, train={**LONG, "precision": "bf16"}, facts=memory(100) | {"run_s": 3600.0})) == {}


@pytest.mark.parametrize(
    ("code", "level", "subject"),
    [
        ("no-checkpoints", "error", plan(train={**LONG, "checkpoint_every_steps": 0})),
        ("no-checkpoints", "error", plan(train={**LONG, "checkpoint_every_steps": 50_000})),
        ("checkpoints-too-rare", "error", plan(train=LONG, facts={"speed": Speed(8.0, "")})),
        ("checkpoints-too-rare", "warning", plan(train={"steps": 1000}, facts={"speed": Speed(8.0, "")})),
        (
            "checkpoints-too-rare",
            "warning",
            plan(train={"steps": 1000, "checkpoint_every_steps": 0}, facts={"speed": Speed(8.0, "")}),
        ),
        ("disk-too-small", "error", plan(facts={"disk_needed_gib": 3.0, "disk_free_gib": 2.9})),
        ("fp32-on-bf16-gpu", "error", plan(GPU)),
        ("bf16-on-cpu", "warning", plan(train={"precision": "bf16"})),
        ("backend-missing", "error", plan(model={"attention_backend": "triton"})),
        ("backend-missing", "error", plan(OLD_GPU, model={"attention_backend": "triton"})),
        ("batch-not-divisible", "error", plan(train={"batch_tokens": 24576}, facts={"world_size": 2})),
        ("memory", "error", plan(facts=memory(15.5))),
        ("memory", "warning", plan(facts=memory(14))),
        ("memory", "warning", plan(train={"compile": True}, facts=memory(24))),
        ("memory", "error", plan(train={"compile": True}, facts=memory(26))),
        ("memory", "error", plan(train={"compile": True, "activation_checkpointing": "full"}, facts=memory(16))),
        ("nothing-compressed", "error", plan(train={"sequence_length": 16})),
        ("selection-covers-all", "info", plan(model={"num_selected_blocks": 8})),
        ("selection-covers-all", "info", plan(model={"window_size": 512})),
        ("warmup-too-long", "error", plan(optim={"warmup_steps": 401})),
        ("learning-rate", "warning", plan(optim={"lr": 0.05})),
        ("learning-rate", "error", plan(optim={"lr": 1.0})),
        ("learning-rate", "error", plan(optim={"lr": 1e-9})),
        ("no-evaluation", "error", plan(train=LONG, eval={"every_steps": 60_000})),
        ("no-evaluation", "error", plan(train=LONG, eval={"every_steps": 50_000})),
        ("no-evaluation", "info", plan(eval={"every_steps": 400})),
        ("no-early-stop", "warning", plan(facts={"run_s": 50 * 3600.0})),
        ("entropy-floor", "error", plan(guards={"entropy_floor_nats": 5.6})),
    ],
)
def test_a_rule_finds_its_problem(code: str, level: str, subject: Plan) -> None:
    findings = {finding.code: finding for finding in check(subject)}
    assert findings[code].level == level
    assert code in CODES
    assert len(findings) == 1 or code == "nothing-compressed"  # rows that short are covered whole too
    assert findings[code].remedy
    assert any(character.isdigit() for character in findings[code].message)


@pytest.mark.parametrize(
    "subject",
    [
        plan(train={**LONG, "checkpoint_every_steps": 1000}, facts={"speed": Speed(3.5, "")}),
        plan(train={"steps": 400, "checkpoint_every_steps": 0}, facts={"speed": Speed(1.0, "")}),
        plan(facts={"disk_needed_gib": 2.9, "disk_free_gib": 3.0}),
        plan(OLD_GPU),
        plan(GPU, train={"precision": "bf16"}, model={"attention_backend": "triton"}),
        plan(replace(CPU, has_fast_bf16=True), train={"precision": "bf16"}),
        plan(facts={"world_size": 2}, train={"batch_tokens": 16384}),
        plan(facts=memory(13)),
        plan(train={"steps": 1, "micro_batch_rows": 1}, optim={"warmup_steps": 1}, eval={"every_steps": 1}),
        plan(facts={"run_s": 50 * 3600.0}, train={"early_stop_evals": 5}),
        plan(guards={"entropy_floor_nats": 5.5}),
        plan(eval={"every_steps": 399}),
        plan(None, run={"device": "cuda"}),
        plan(model={"layer_types": ["full_attention"], "window_size": 4096}),
    ],
)
def test_a_rule_leaves_the_sound_neighbour_alone(subject: Plan) -> None:
    assert found(subject) == {}


def test_a_used_run_folder_is_found_on_this_machine_only(tmp_path: Path) -> None:
    here = replace(CPU, is_here=True)
    (tmp_path / "old").mkdir()
    used = {"folder": str(tmp_path), "name": "old"}
    assert found(plan(here, run=used)) == {"run-folder-used": "error"}
    assert found(plan(here, run=used | {"name": "new"})) == {}
    assert found(plan(CPU, run=used)) == {}


def test_the_remedies_of_numbers_are_right() -> None:
    rare = check(plan(train=LONG, facts={"speed": Speed(8.0, "")}))[0]
    assert "set train.checkpoint_every_steps to 225 or less" in rare.remedy  # half an hour
    last_only = plan(train={"steps": 1000, "checkpoint_every_steps": 3000}, facts={"speed": Speed(9.0, "")})
    assert check(last_only)[0].message.startswith("1,000 steps between checkpoints are about 2.5 hours")
    uneven = check(plan(train={"batch_tokens": 24576}, facts={"world_size": 2}))[0]
    assert uneven.message.endswith("the next one is 32768")


def test_only_known_findings_that_the_trainer_can_live_with_may_be_allowed() -> None:
    check_allowed(["leak", "no-checkpoints"])
    with pytest.raises(ValueError, match="did you mean 'no-checkpoints'"):
        RunConfig.model_validate({"preflight": {"allow": ["no-checkpoint"]}})
    for code in NOT_OVERRIDABLE:
        with pytest.raises(ValueError, match="cannot be overridden"):
            check_allowed([code])


def test_a_gpu_is_found_by_a_part_of_its_name() -> None:
    assert machine_named("rtx 4090").memory_gib == 23.6
    with pytest.raises(ValueError, match=r"no known device; known: NVIDIA B200"):
        machine_named("z9")
    with pytest.raises(ValueError, match="names NVIDIA A100-SXM4-80GB, NVIDIA A100-SXM4-40GB"):
        machine_named("a100")


def test_the_guide_lists_every_finding_and_whether_it_can_be_overridden() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "before_a_run.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", guide, flags=re.MULTILINE))
    listed = {code: level for code, level in rows.items() if code in CODES or "-" in code}
    assert sorted(listed) == sorted(CODES)
    assert {code for code, level in listed.items() if "not overridable" in level} == NOT_OVERRIDABLE
