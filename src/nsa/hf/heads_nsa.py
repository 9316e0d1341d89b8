"""`NSAModel` with other output layers: a class for each sequence or token, or the span of an answer.

    >>> config = NSAConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=3, pad_token_id=0)
    >>> NSAForSequenceClassification(config)(torch.tensor([[0, 0, 5, 7], [3, 4, 5, 6]])).logits.shape
    torch.Size([2, 3])

Losses, labels and outputs are those of the transformers classes of these names. A sequence is judged by its last token
that is not `config.pad_token_id`, whichever side the padding is on; a batch of several needs that id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .modeling_nsa import NSAPreTrainedModel


class _Head(NSAPreTrainedModel):
    """Labels may be integers of any size; PyTorch's losses take int64 only."""

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        loss = super().loss_function
        return lambda *args, **named: loss(*map(_long, args), **{name: _long(x) for name, x in named.items()})

    @loss_function.setter
    def loss_function(self, value: Callable[..., Tensor]) -> None:
        self._loss_function = value


def _long(x: Any) -> Any:
    return x.long() if isinstance(x, Tensor) and x.dtype in (torch.int16, torch.int32) else x


class NSAForSequenceClassification(GenericForSequenceClassification, _Head):
    """One of `config.num_labels` classes, or numbers, for each sequence."""


class NSAForTokenClassification(GenericForTokenClassification, _Head):
    """One of `config.num_labels` classes for each token, from what stands before it."""


class NSAForQuestionAnswering(GenericForQuestionAnswering, _Head):
    """Scores of each token as the first and the last of the answer."""
