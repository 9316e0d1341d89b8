"""The loss of the next token, for large vocabularies without a tensor of all logits.

Logits of many tokens over a large vocabulary are the largest tensor of a training step: 65,536 tokens times 50,257 in
fp32 are 12 GiB, their gradient as much again. Here the output layer is multiplied for a few thousand tokens at a time,
and their gradient is worked out at once, while the logits are there; statistics are fp32.

    >>> loss = NextTokenLoss(model)
    >>> loss(input_ids, labels, cu_seqlens).backward()

Legend: N tokens, C features, V vocabulary, W vocabulary padded for the matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED_LABEL = -100
MAX_LOGITS = 2**28  # logits that exist at a time: 1 GiB in fp32
ALIGNMENT = 64  # a row of logits that is no multiple of this makes the tensor cores' products several times slower


class NextTokenLoss(nn.Module):
    """A causal language model with its loss: the sum of -log p(label) over the valid labels.

    Args:
        model: called with `input_ids`, `cu_seqlens`, `max_length_q` and `use_cache`, gives `logits`. Where there would
            be more than `max_logits` of them, `model.model` and `model.lm_head` (no bias) are called instead.
        max_logits: logits that may exist at a time.
        compiled: in training, run the arithmetic on the logits through torch.compile: two passes instead of ten.
    """

    def __init__(self, model: nn.Module, *, max_logits: int = MAX_LOGITS, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.max_logits = model, max_logits
        head = getattr(model, "lm_head", None)
        self.vocab_size = head.out_features if isinstance(head, nn.Linear) else 0
        self._softmax_step = torch.compile(softmax_step, dynamic=False) if compiled else softmax_step

    def forward(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """An fp32 scalar that carries gradients.

        Args:
            input_ids, labels: `[B, T]`; the label of each token, -100 where there is none.
            cu_seqlens: bounds of the documents over the flattened B*T tokens, with all row ends; None: each row is one
                document.
        """
        longest = input_ids.shape[1]
        if cu_seqlens is not None:
            input_ids = input_ids.reshape(1, -1)
        labels = labels.reshape(-1)
        model: Any = self.model
        call = {"input_ids": input_ids, "cu_seqlens": cu_seqlens, "max_length_q": longest, "use_cache": False}
        if labels.numel() * self.vocab_size <= self.max_logits:
            logits = model(**call).logits.flatten(0, 1)
            return F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                labels,
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
        hidden = model.model(**call).last_hidden_state.flatten(0, 1)
        # The largest power of two, so that few shapes are compiled and the chunks come out even.
        chunk_tokens = 2 ** max(0, (self.max_logits // self.vocab_size).bit_length() - 1)
        step = self._softmax_step if torch.is_grad_enabled() else softmax_step
        return chunked_cross_entropy(hidden, model.lm_head.weight, labels, chunk_tokens, step)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    step: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T` `[N, V]` against `labels`, `chunk_tokens` rows at a time.

    Args:
        hidden: `[N, C]`.
        weight: `[V, C]`; under autocast the products are in its dtype, and the weight's gradient is summed in fp32.
        labels: `[N]`, -100 where there is none.
        step: `softmax_step`, or that compiled.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(
        hidden.to(dtype), weight, labels, chunk_tokens, step or softmax_step, with_gradient
    )  # pyright: ignore[reportReturnType]


def softmax_step(logits: Tensor, labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of some rows of logits, and its gradient in their dtype.

    Args:
        logits: `[n, W]`, of which the first `vocab_size` columns count.
        labels: `[n]`, -100 where there is none.
    """
    column = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.masked_fill(column >= vocab_size, float("-inf"))
    lse = wide.logsumexp(dim=1, keepdim=True)
    valid = (labels != IGNORED_LABEL).unsqueeze(1)
    chosen = labels.clamp(min=0).unsqueeze(1)
    nats = ((lse - wide.gather(1, chosen)) * valid).sum()
    gradient = ((wide - lse).exp() - (column == chosen).to(wide.dtype)) * valid
    return nats, gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Works out both gradients in the forward; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        step: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        with_gradient: bool,
    ) -> Tensor:
        vocab_size = weight.shape[0]
        padded = F.pad(weight.to(hidden.dtype), (0, 0, 0, -vocab_size % ALIGNMENT))
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(padded, dtype=wide) if with_gradient else None
        total = hidden.new_zeros((), dtype=wide)
        # The dtypes are as they should be; autocast would cast fp64 too.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = hidden[start : start + chunk_tokens]
                nats, gradient = step(rows @ padded.t(), labels[start : start + chunk_tokens], vocab_size)
                total += nats
                if grad_hidden is not None and grad_weight is not None:
                    torch.mm(gradient, padded, out=grad_hidden[start : start + chunk_tokens])
                    grad_weight += gradient.t() @ rows
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight[:vocab_size].to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None, None, None
