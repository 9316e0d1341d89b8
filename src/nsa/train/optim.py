"""AdamW with its weight-decay groups, and the learning rate of each step.

optimizer = build_optimizer(model, config.optim)
set_learning_rate(optimizer, learning_rate(step, config.train.steps, config.optim))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa.config.run import OptimSection
from nsa.gate import Gate


def build_optimizer(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """AdamW over the model's parameters; weight decay on the linear layers' weights alone (see `decays`)."""
    chosen = decays(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name in chosen], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named.items() if name not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def decays(model: nn.Module) -> set[str]:
    """Names of the parameters that decay: weights of `nn.Linear` outside gates.

    Norms, biases, embeddings (also one that is tied to the output layer), gates, and the compression's kernels and
    positions have none: they are no maps between features, and start at values that decay would pull away from.
    """
    exempt = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    exempt |= {id(p) for gate in model.modules() if isinstance(gate, Gate) for p in gate.parameters()}
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in exempt
    }


def learning_rate(step: int, num_steps: int, config: OptimSection) -> float:
    """Rate of optimizer step `step` in 1..num_steps: linear up to the peak, then a cosine to the floor at the end."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of at most `max_norm`; returns the norm before that.

    Of sharded gradients it is the norm of the whole ones.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, whole)
    return whole
