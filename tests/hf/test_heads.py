"""Classification and question answering: padding, losses, saving, auto classes, and the weights of a language model."""

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nsa.hf import NSAForQuestionAnswering, NSAForSequenceClassification, NSAForTokenClassification
from tiny_models import left_padded, tiny_config, tiny_model

LAYERS = ("nsa", "full_attention")
ROWS = [torch.arange(1, 40), torch.arange(5, 22), torch.arange(30, 33)]
IDS, MASK = left_padded(ROWS)


def classifier(**changes) -> NSAForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config(*LAYERS, pad_token_id=0, **{"num_labels": 3, **changes})
    return NSAForSequenceClassification(config).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_judged_by_its_last_token_whatever_side_is_padded(side):
    model = classifier()
    ids, mask = (IDS, MASK) if side == "left" else (torch.zeros_like(IDS), torch.zeros_like(MASK))
    if side == "right":
        for i, row in enumerate(ROWS):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = model(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[None]).logits for row in ROWS])
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, alone)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, torch.tensor([0, 2, 1])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)),
        ({"problem_type": "multi_label_classification"}, torch.eye(3, dtype=torch.float64)),
    ],
)
def test_every_kind_of_label_trains(changes, labels):
    model = classifier(**changes)
    model(IDS, attention_mask=MASK, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.score.weight.grad.any()


def test_int32_labels_train_as_int64_ones_do():
    model, labels = classifier(), torch.tensor([0, 2, 1])
    losses = [
        model(IDS.to(kind), attention_mask=MASK, labels=labels.to(kind)).loss for kind in (torch.int32, torch.long)
    ]
    assert torch.equal(*losses)


def test_tokens_and_answers_are_scored():
    config = tiny_config(*LAYERS, num_labels=4, pad_token_id=0)
    tokens = NSAForTokenClassification(config).double().eval()
    out = tokens(IDS, attention_mask=MASK, labels=IDS % 4)
    assert out.logits.shape == (*IDS.shape, 4)
    out.loss.backward()
    answers = NSAForQuestionAnswering(config).double().eval()
    places = torch.tensor([30, 35, 38])
    out = answers(IDS, attention_mask=MASK, start_positions=places - 1, end_positions=places)
    assert out.start_logits.shape == out.end_logits.shape == IDS.shape
    out.loss.backward()


@torch.no_grad()
def test_saved_heads_come_back_by_the_auto_classes(tmp_path):
    for kind, auto in (
        (NSAForSequenceClassification, AutoModelForSequenceClassification),
        (NSAForTokenClassification, AutoModelForTokenClassification),
        (NSAForQuestionAnswering, AutoModelForQuestionAnswering),
    ):
        model = kind(tiny_config(*LAYERS, num_labels=2, pad_token_id=0)).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = auto.from_pretrained(tmp_path / kind.__name__)
        assert type(loaded) is kind
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_classifier_starts_from_a_language_model(tmp_path):
    language = tiny_model(*LAYERS)
    language.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    for name, x in language.model.state_dict().items():
        assert torch.equal(x, model.model.state_dict()[name])
    assert model.score.weight.shape == (5, 32)
    assert model.score.weight.any()
