"""Loss on held-out documents: nats per token, perplexity, and bits per byte of the text.

    result = evaluate(model, batches, device=torch.device("cpu"), num_bytes=batches.num_bytes)
    print(result.bits_per_byte)

Legend: B rows, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100


class TokenBatch(Protocol):
    """A batch of `nsa.data`: `[B, T]` ids and labels, and the document bounds over the flattened B*T tokens."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...


@dataclass(frozen=True)
class EvalResult:
    """Sums over an evaluation, and what follows from them.

    Attributes:
        sum_nats: negative log-likelihood of all predicted tokens.
        num_tokens: predicted tokens.
        num_bytes: bytes of text that those tokens stand for.
    """

    sum_nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.sum_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text; comparable between tokenizers."""
        return self.sum_nats / math.log(2) / self.num_bytes


def sum_loss(model: nn.Module, batch: TokenBatch, device: torch.device) -> Tensor:
    """Sum of -log p(label) over the batch's valid labels, an fp32 scalar that carries gradients.

    The rows are given to the model as one packed sequence `[1, B*T]`, whose documents do not see one another.
    """
    packed = batch.input_ids.to(device, non_blocking=True).reshape(1, -1)
    labels = batch.labels.to(device, non_blocking=True).reshape(-1)
    cu_seqlens = batch.cu_seqlens.to(device, non_blocking=True)
    logits = model(input_ids=packed, cu_seqlens=cu_seqlens, use_cache=False).logits
    return nn.functional.cross_entropy(logits.squeeze(0).float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[TokenBatch], *, device: torch.device, num_bytes: int) -> EvalResult:
    """Score finite batches in evaluation mode; the model's mode is put back.

    Args:
        batches: the same ones each time, so that evaluations can be compared.
        device: where the model is.
        num_bytes: bytes of text that the batches' valid labels stand for.

    Raises:
        ValueError: the batches hold no token to predict.
    """
    was_training = model.training
    model.eval()
    sum_nats, num_tokens = 0.0, 0
    for batch in batches:
        sum_nats += sum_loss(model, batch, device).item()
        num_tokens += int((batch.labels != IGNORED_LABEL).sum())
    model.train(was_training)
    if not num_tokens:
        raise ValueError("the held-out batches hold no token to predict; give more or longer held-out documents")
    return EvalResult(sum_nats, num_tokens, num_bytes)
