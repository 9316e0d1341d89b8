"""Loss on held-out documents: nats per token, perplexity, and bits per byte of the text.

    result = evaluate(model, batches, device=torch.device("cpu"), num_bytes=batches.num_bytes)
    print(result.bits_per_byte)

Legend: B rows, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nsa.data.stream.packing import Batch
from nsa.loss import IGNORED_LABEL, NextTokenLoss


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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What the model takes of a batch, on `device`; the host does not wait for a copy to a GPU."""

    def copy(x: Tensor) -> Tensor:
        # Only from pinned memory does a copy run beside the host.
        pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned() else x
        return pinned.to(device, non_blocking=True)

    return replace(batch, document_ids=None).map(copy)


def sum_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Sum of -log p(label) over the batch's valid labels, an fp32 scalar that carries gradients.

    The rows are given to the model as one packed sequence `[1, B*T]`, whose documents do not see one another.

    Args:
        model: a causal language model, or one with its loss (`NextTokenLoss`).
    """
    loss = model if isinstance(model, NextTokenLoss) else NextTokenLoss(model)
    there = to_device(batch, device)
    return loss(there.input_ids, there.labels, there.cu_seqlens)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    num_bytes: int,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> EvalResult:
    """Score finite batches in evaluation mode; the model's mode is put back.

    Args:
        model: as in `sum_loss`.
        batches: the same ones each time and on all ranks, so that evaluations can be compared.
        device: where the model is.
        num_bytes: bytes of text that the batches' valid labels stand for.
        rank, world_size: this process scores every world_size-th batch, from the rank-th.
        total: sums a tensor over the processes; the result is then equal on all.

    Raises:
        ValueError: the batches hold no token to predict.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    sum_nats = torch.zeros((), dtype=torch.float64, device=device)
    for batch, counts in _share(batches, rank, world_size):
        nats = sum_loss(model, batch, device)
        if counts:
            sum_nats += nats
            sums[1] += int((batch.labels != IGNORED_LABEL).sum())
    sums[0] = sum_nats
    model.train(was_training)
    nats, tokens = (sums if total is None else total(sums)).tolist()
    if not tokens:
        raise ValueError("the held-out batches hold no token to predict; give more or longer held-out documents")
    return EvalResult(nats, int(tokens), num_bytes)


def _share(batches: Iterable[Batch], rank: int, world_size: int) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches; where the last round has none for it, one that does not count.

    Ranks with sharded weights compute together, so each needs as many batches as the others.
    """
    own, last, place = None, None, world_size - 1
    for index, last in enumerate(batches):
        place = index % world_size
        own = last if place == rank else own
        if place == world_size - 1:
            assert own is not None
            yield own, True
            own = None
    if last is not None and place != world_size - 1:
        yield (last, False) if own is None else (own, True)
