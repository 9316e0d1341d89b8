"""Recomputed and compiled layers: the same gradients, less memory, and the blocks are chosen once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa.hf import NSAForCausalLM
from nsa.loss import NextTokenLoss
from nsa.ops import torch_native
from nsa.train.activation import checkpoint_activations
from nsa.train.model import compile_layers
from tiny_models import tiny_model

LAYERS = ("nsa", "full_attention", "nsa", "sliding_attention")
STAGES = ("compressed_attention", "select_blocks", "selected_attention", "window_attention")


def example(seed: int = 0, bounds: tuple[int, ...] = (0, 20, 50, 60)) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and document bounds of two rows of 30."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 61, (2, 30), generator=draw) for _ in range(2))
    return ids, labels, torch.tensor(bounds, dtype=torch.int32)


def gradients(model: NSAForCausalLM, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    NextTokenLoss(model)(*batch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each stage of the operator has run."""
    calls = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        original = getattr(torch_native, f"{stage}_forward")

        def counted(*arguments, stage=stage, original=original):
            calls[stage] += 1
            return original(*arguments)

        monkeypatch.setattr(torch_native, f"{stage}_forward", counted)
    return calls


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_the_blocks_are_chosen_once_and_the_gradients_stay(kind: str, times: int, count: dict[str, int]) -> None:
    plain, checkpointed = (tiny_model(*LAYERS).train() for _ in range(2))
    checkpoint_activations(checkpointed, kind)
    expected = gradients(plain, example())
    count.update(dict.fromkeys(STAGES, 0))
    assert all(torch.equal(a, b) for a, b in zip(gradients(checkpointed, example()), expected, strict=True))
    assert count == {
        "compressed_attention": 2 * times,
        "select_blocks": 2,  # one for each of the two NSA layers
        "selected_attention": 2 * times,
        "window_attention": 3 * times,
    }


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


def test_a_checkpointed_model_keeps_less() -> None:
    kept = []
    for kind in ("none", "full"):
        model = tiny_model("nsa", "nsa").train()
        checkpoint_activations(model, kind)
        saved = SavedBytes()
        with saved:
            loss = NextTokenLoss(model)(*example())
        kept.append(sum(saved.storages.values()))
        del loss
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("kind", ["none", "selective"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_layers_give_the_same_gradients_and_choose_once(kind: str, count: dict[str, int]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (tiny_model("nsa", "nsa", "nsa").train() for _ in range(2))
    checkpoint_activations(compiled, kind)
    compile_layers(compiled, backend="aot_eager")
    for seed, bounds in enumerate([(0, 20, 60), (0, 7, 9, 60), (0, 10, 20, 30, 60)]):
        expected = gradients(plain, example(seed, bounds))
        count.update(dict.fromkeys(STAGES, 0))
        for ours, theirs in zip(gradients(compiled, example(seed, bounds)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert count["select_blocks"] == 3
    # Three layers and three numbers of documents.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_layers_generate_and_evaluate_as_they_are() -> None:
    plain, compiled = (tiny_model("nsa", "full_attention") for _ in range(2))

    def refuse(graph, inputs):
        raise AssertionError("compiled without gradients")

    compile_layers(compiled, backend=refuse)
    ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(compiled.generate(ids, **options), plain.generate(ids, **options))
    with torch.no_grad():
        assert torch.equal(NextTokenLoss(compiled)(*example()), NextTokenLoss(plain)(*example()))


def test_hybrid_models_compile_around_packed_dense_attention() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (tiny_model("full_attention", "nsa").train() for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, example()), gradients(plain, example()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
