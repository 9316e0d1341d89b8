"""Training on two gloo ranks follows training in one process, and what one rank meets ends or skips a step on both.

Tolerance: losses in fp32 within 1e-5 of one process over 20 steps, as only the order of sums differs; in bf16 within
7e-5 of one process in bf16 over 3.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nsa.config.run import RunConfig
from nsa.runs.tables import TRAINING_COLUMNS, read_csv
from nsa.train.parallel import Parallel
from nsa.train.trainer import Trainer
from ranks import RankFailure, environment_of_rank, run_ranks
from tiny_runs import builder, tiny_config_values, write_corpus

STEPS = 20
ACTIONS = {"ddp": "stop", "fsdp2": "skip"}
BODY = """
import functools
import nsa.train.trainer as trainer_module
from nsa.loss import NextTokenLoss
from nsa.data import Batch
from nsa.config.run import RunConfig
from nsa.train.guards import TrainingError
from nsa.train.model import compile_layers
from nsa.train.trainer import Trainer

def own(model):
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]

def curve(trainer):
    exchanges = []
    if trainer.parallel.mode == "ddp":
        def exchange(state, bucket):
            exchanges.append(bucket.index())
            future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])
        trainer.shared_loss.register_comm_hook(None, exchange)
    first = trainer.evaluate().val_loss
    records = [trainer.train_step() for _ in range(trainer.config.train.steps)]
    last, shares = trainer.evaluate().val_loss, own(trainer.model)
    whole = trainer.whole_model()
    return {
        "losses": [record.loss for record in records],
        "norms": [record.grad_norm for record in records],
        "evaluations": [first, last],
        "num_local": sum(w.numel() for w in shares),
        "exchanges": exchanges,
        "weights": None if whole is None else {name: w.detach() for name, w in whole.state_dict().items()},
        "dtypes": {w.dtype for w in shares},
    }

def sparse(trainer):
    # The batches with odd numbers are those of rank 1: it has a single label, then none.
    rows = [torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    labels = [x.roll(-1, 1) for x in rows]
    labels[1][:] = labels[3][:] = -100
    labels[1][0, 3] = 7
    batches = [Batch(x, y, None) for x, y in zip(rows, labels)]
    trainer.batches = iter(batches[trainer.parallel.rank::trainer.parallel.world_size])
    record = trainer.train_step()
    return record.loss, record.grad_norm

def damaged(trainer):
    seen = []
    for step in (1, 2):
        if step == 2 and trainer.parallel.rank == 1:
            trainer.model.model.norm.register_forward_hook(lambda *call: call[-1] * float("nan"))
        before = own(trainer.model)
        try:
            seen.append(trainer.train_step().loss)
        except TrainingError as error:
            seen.append(str(error))
        seen.append(all(torch.equal(a, b) for a, b in zip(before, own(trainer.model))))
    return seen

def low(trainer):
    config = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update={"precision": "bf16"})})
    low = Trainer(config, trainer.parallel)
    inputs = set()
    low.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.add(args[0].dtype))
    return [low.train_step().loss for _ in range(3)], inputs, {w.dtype for w in own(low.model)}

def uncut(trainer):
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 0  # a bucket of DDP is full after its first weight
    trainer_module.compile_layers = functools.partial(compile_layers, backend=backend)
    config = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update={"compile": True})})
    Trainer(config, trainer.parallel).train_step()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return len(graphs)

def compiled(trainer):
    trainer_module.compile_layers = functools.partial(compile_layers, backend="eager")
    trainer_module.NextTokenLoss = lambda model, compiled: NextTokenLoss(model, max_logits=259 * 40)
    changed = {"compile": True, "activation_checkpointing": "selective"}
    config = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update=changed)})
    fast = Trainer(config, trainer.parallel)
    losses = [fast.train_step().loss for _ in range(3)]
    return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]

with setup_parallel("cpu", given["train"]["parallel"], timeout_s=120) as parallel:
    config = RunConfig.model_validate(given)
    report({part.__name__: part(Trainer(config, parallel)) for part in (curve, sparse, damaged, low, uncut, compiled)})
"""
PARTS = BODY[: BODY.index("with setup_parallel")]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Configs as plain values; two micro-batches of each of two ranks, packed documents."""
    folder = tmp_path_factory.mktemp("parallel")
    write_corpus(folder / "words.txt")
    build = builder(tiny_config_values(folder / "words.txt", folder / "runs"))

    def changed(**sections: dict[str, Any]) -> dict[str, Any]:
        train = {"steps": STEPS, "batch_tokens": 512, "micro_batch_rows": 2, **sections.pop("train", {})}
        return build(train=train, model={"num_hidden_layers": 2}, **sections).model_dump()

    return changed


@pytest.fixture(scope="module")
def alone(values: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The same in one process."""
    namespace: dict[str, Any] = {"torch": torch}
    exec(PARTS, namespace)
    config = RunConfig.model_validate(values())
    return {name: namespace[name](Trainer(config)) for name in ("curve", "sparse", "low")}


@pytest.fixture(scope="module", params=ACTIONS)
def together(request: pytest.FixtureRequest, values: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What each of two ranks saw, with its mode and what the guards do."""
    action = ACTIONS[request.param]
    ranks = run_ranks(BODY, values(train={"parallel": request.param}, guards={"on_nonfinite": action}))
    return {"mode": request.param, "action": action, "ranks": ranks}


def test_two_ranks_follow_the_curve_of_one_process(alone: dict[str, Any], together: dict[str, Any]) -> None:
    first, second = (rank["curve"] for rank in together["ranks"])
    for name in ("losses", "norms", "evaluations"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(alone["curve"][name], rel=1e-5)
    assert len(first["losses"]) == STEPS
    assert first["losses"][-1] < first["losses"][0] - 1


def test_rank_0_can_have_the_whole_model(alone: dict[str, Any], together: dict[str, Any]) -> None:
    first, second = (rank["curve"] for rank in together["ranks"])
    assert second["weights"] is None
    for name, weight in alone["curve"]["weights"].items():
        # AdamW divides by the gradient's size, so rounding of tiny gradients shows in full.
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-3, msg=lambda m, n=name: n + m)


def test_fp32_weights_are_shared_out_as_the_mode_says(alone: dict[str, Any], together: dict[str, Any]) -> None:
    whole = alone["curve"]["num_local"]
    held = [rank["curve"]["num_local"] for rank in together["ranks"]]
    assert all(rank["curve"]["dtypes"] == {torch.float32} for rank in together["ranks"])
    if together["mode"] == "ddp":
        assert held == [whole, whole]
    else:
        assert sum(held) == whole
        assert max(held) < 0.6 * whole


def test_gradients_travel_once_a_step_not_once_a_micro_batch(together: dict[str, Any]) -> None:
    exchanges = together["ranks"][0]["curve"]["exchanges"]
    if together["mode"] == "ddp":
        assert len(exchanges) == STEPS * len(set(exchanges))


def test_every_valid_label_of_all_ranks_weighs_alike(alone: dict[str, Any], together: dict[str, Any]) -> None:
    for rank in together["ranks"]:
        assert rank["sparse"] == pytest.approx(alone["sparse"], rel=1e-5)


def test_a_nan_of_one_rank_is_judged_alike_by_both(together: dict[str, Any]) -> None:
    for rank in together["ranks"]:
        loss, unchanged, second, second_unchanged = rank["damaged"]
        assert math.isfinite(loss)
        assert not unchanged
        assert second_unchanged
        assert ("step 2 has loss nan" in second) if together["action"] == "stop" else math.isnan(second)


def test_compiled_and_recomputed_layers_and_a_loss_in_chunks_follow_the_same_curve(
    alone: dict[str, Any], together: dict[str, Any]
) -> None:
    for rank in together["ranks"]:
        losses, num_graphs = rank["compiled"]
        assert losses == pytest.approx(alone["curve"]["losses"][:3], rel=1e-5)
        assert num_graphs == 1


def test_bf16_computes_in_bf16_on_fp32_weights(alone: dict[str, Any], together: dict[str, Any]) -> None:
    for rank in together["ranks"]:
        losses, inputs, weights = rank["low"]
        assert losses == pytest.approx(alone["low"][0], rel=7e-5)  # FSDP2 rounds the norms' weights too
        assert losses == pytest.approx(alone["curve"]["losses"][:3], rel=5e-3)
        assert losses != alone["curve"]["losses"][:3]
        assert (inputs, weights) == ({torch.bfloat16}, {torch.float32})


def test_alike_layers_are_one_graph_wherever_ddp_cuts_its_buckets(together: dict[str, Any]) -> None:
    assert [rank["uncut"] for rank in together["ranks"]] == [1, 1]


def test_tokens_that_do_not_divide_among_the_ranks_are_refused(values: Callable[..., dict[str, Any]]) -> None:
    config = RunConfig.model_validate(values(train={"batch_tokens": 384}))
    with pytest.raises(ValueError, match=r"must be a multiple of 2 processes \* train\.micro_batch_rows 2 .* 512"):
        Trainer(config, Parallel(0, 0, 2, torch.device("cpu"), "ddp"))


FAILING = """
import sys
from nsa.cli import main
from nsa.data.errors import DataError
from nsa.train.trainer import Trainer
honest = Trainer.train_step
def broken(trainer):
    if trainer.parallel.rank == 1 and trainer.step == 2:
        raise DataError("part-7.jsonl, line 3 is not JSON")
    return honest(trainer)
Trainer.train_step = broken
sys.exit(main(["train", given]))
"""


def write_config(folder: Path, values: dict[str, Any], name: str) -> Path:
    values["run"] |= {"name": name, "folder": str(folder / "runs")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))), encoding="utf-8")
    return path


def test_a_failure_of_one_rank_ends_both_and_is_named(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = write_config(tmp_path, values(train={"steps": 4}, sample={"max_new_tokens": 0}), "failing")
    with pytest.raises(RankFailure) as caught:
        run_ranks(FAILING, str(config), timeout_s=60)
    assert all(caught.value.codes)
    assert "failed: part-7.jsonl, line 3 is not JSON" in caught.value.errors[1]
    assert "rank 1, after step 2" in caught.value.errors[1]
    assert len(read_csv(tmp_path / "runs" / "failing" / "training.csv", TRAINING_COLUMNS)) == 2


def test_the_command_under_torchrun_prints_and_writes_once(
    values: Callable[..., dict[str, Any]], alone: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, values(train={"parallel": "fsdp2"}), "both")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "nsa.cli", "train", str(config)],
        env=environment_of_rank(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"step {STEPS}/{STEPS}  loss") == 1
    rows = read_csv(tmp_path / "runs" / "both" / "training.csv", TRAINING_COLUMNS)
    assert [row["loss"] for row in rows] == pytest.approx(alone["curve"]["losses"], rel=1e-5)
    assert (tmp_path / "runs" / "both" / "samples" / "after.txt").is_file()
