"""Held-out loss against models whose loss is known, and its independence of batches."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nsa.data import Batch, ByteTokenizer, DataConfig, Documents, EvalBatches, build_eval_batches
from nsa.eval.perplexity import EvalResult, evaluate, sum_loss

CPU = torch.device("cpu")
VOCABULARY = ByteTokenizer.vocab_size


class TableModel(nn.Module):
    """Gives each token the same log-probabilities for what follows it; `[V, V]`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.calls: list[dict[str, object]] = []

    def forward(self, input_ids: Tensor, **options: object) -> SimpleNamespace:
        self.calls.append({"shape": tuple(input_ids.shape), **options})
        return SimpleNamespace(logits=self.table[input_ids])


def batches(texts: list[str], **sizes: int) -> EvalBatches:
    names = [f"text {index}" for index in range(len(texts))]
    documents = list(Documents(names, texts))
    return EvalBatches(documents, tokenizer=ByteTokenizer(), **sizes)


def test_a_uniform_guess_costs_log2_of_the_vocabulary_for_each_label() -> None:
    held_out = batches(["abcd" * 30, "xyz"], sequence_length=16, rows_per_batch=3)
    result = evaluate(
        TableModel(torch.zeros(VOCABULARY, VOCABULARY)), held_out, device=CPU, num_bytes=held_out.num_bytes
    )
    labels = (120 + 3) - 2 + 2  # every byte but each text's first, and each text's end
    assert result.num_tokens == labels
    assert result.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(labels * math.log2(VOCABULARY) / (119 + 2), rel=1e-6)


def test_the_loss_is_the_mean_over_tokens_however_they_are_batched() -> None:
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY)
    text = "the state of the union " * 7
    ids = [*text.encode(), ByteTokenizer.eos_id]
    by_hand = [-table[a].log_softmax(-1)[b].item() for a, b in itertools.pairwise(ids)]
    for sizes in ({"sequence_length": 8, "rows_per_batch": 1}, {"sequence_length": 50, "rows_per_batch": 4}):
        held_out = batches([text], **sizes)
        result = evaluate(TableModel(table), held_out, device=CPU, num_bytes=held_out.num_bytes)
        assert result.sum_nats == pytest.approx(sum(by_hand), rel=1e-6)
        assert result.num_tokens == len(by_hand)


def test_rows_are_given_as_one_packed_sequence_and_ignored_labels_cost_nothing() -> None:
    model = TableModel(torch.randn(VOCABULARY, VOCABULARY))
    ids, bounds = torch.randint(0, 256, (2, 6)), torch.tensor([0, 6, 12], dtype=torch.int32)
    labels = torch.full((2, 6), -100)
    labels[1, 3] = 65
    loss = sum_loss(model, Batch(ids, labels, bounds), CPU)
    assert loss.item() == pytest.approx(-model.table[ids[1, 3]].log_softmax(-1)[65].item(), rel=1e-6)
    assert model.calls[0]["shape"] == (1, 12)
    assert model.calls[0]["cu_seqlens"] is bounds or torch.equal(model.calls[0]["cu_seqlens"], bounds)
    assert model.calls[0]["use_cache"] is False


def test_evaluation_puts_the_mode_back_and_keeps_no_graph() -> None:
    held_out = batches(["abcdef"], sequence_length=4, rows_per_batch=2)
    model = TableModel(torch.zeros(VOCABULARY, VOCABULARY))
    model.train()
    evaluate(model, held_out, device=CPU, num_bytes=held_out.num_bytes)
    assert model.training
    assert model.table.grad is None


def test_nothing_to_predict_is_an_error_and_a_huge_loss_is_no_overflow() -> None:
    empty = Batch(
        torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100), torch.tensor([0, 2], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(TableModel(torch.zeros(VOCABULARY, VOCABULARY)), [empty], device=CPU, num_bytes=1)
    assert EvalResult(sum_nats=1e6, num_tokens=10, num_bytes=10).perplexity == math.inf


def test_held_out_documents_are_the_named_ones() -> None:
    config = DataConfig(heldout=("1790 *", "1934 *"), max_eval_tokens=4096)
    held_out = build_eval_batches(config, tokenizer=ByteTokenizer(), sequence_length=256, rows_per_batch=4)
    assert held_out.document_names
    assert all(name.startswith(("1790", "1934")) for name in held_out.document_names)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_score_each_batch_once_and_equally_many(world_size: int) -> None:
    held_out = batches(["the state of the union " * 4], sequence_length=8, rows_per_batch=3)
    assert sum(1 for _ in held_out) == 4
    table = torch.randn(VOCABULARY, VOCABULARY)
    shares, calls = [], []
    for rank in range(world_size):
        model = TableModel(table)
        options = {"device": CPU, "num_bytes": 1, "rank": rank, "world_size": world_size}
        evaluate(model, held_out, **options, total=lambda sums: shares.append(sums) or torch.ones(2))
        calls.append(len(model.calls))
    whole = evaluate(TableModel(table), held_out, device=CPU, num_bytes=1)
    nats, tokens = torch.stack(shares).sum(0).tolist()
    assert tokens == whole.num_tokens
    assert nats == pytest.approx(whole.sum_nats, rel=1e-12)
    assert len(set(calls)) == 1
