"""The learned gate that weighs the three branches for each token and head (paper Eq. 5).

>>> import torch
>>> Gate(64, num_heads=4)(torch.randn(1, 7, 64)).shape
torch.Size([1, 7, 4, 3])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa.geometry import BRANCHES


class Gate(nn.Module):
    """MLP of the hidden state to one weight for each head and branch, in the order cmp, slc, win.

    The last layer starts at zero, so that the branches start equal.

    Args:
        hidden_size: features of the hidden state.
        num_heads: H, query heads.
        kind: "softmax" over the branches, or "sigmoid" for each branch by itself (the paper's).
        temperature: divides the logits; above 1 flattens, below 1 sharpens.

    Raises:
        ValueError: an unknown kind, or a temperature that is not positive.
    """

    def __init__(self, hidden_size: int, num_heads: int, kind: str = "softmax", temperature: float = 1.0) -> None:
        super().__init__()
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"gate must be 'softmax' or 'sigmoid', not {kind!r}")
        if temperature <= 0:
            raise ValueError(f"gate_temperature must be positive, not {temperature}")
        self.num_heads, self.kind, self.temperature = num_heads, kind, temperature
        inner = max(32, hidden_size // 8)
        self.up = nn.Linear(hidden_size, inner)
        self.down = nn.Linear(inner, num_heads * len(BRANCHES))
        self.reset_last_layer()

    def reset_last_layer(self) -> None:
        """Make the branches equal again."""
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, forced_branch: str | None = None) -> Tensor:
        """`[B, T, C] -> [B, T, H, 3]`; `forced_branch` gives that branch weight 1 and the others 0.

        Raises:
            ValueError: `forced_branch` is no branch.
        """
        if forced_branch is not None:
            if forced_branch not in BRANCHES:
                raise ValueError(f"forced_branch must be None or one of {', '.join(BRANCHES)}, not {forced_branch!r}")
            gates = x.new_zeros(*x.shape[:2], self.num_heads, len(BRANCHES))
            gates[..., BRANCHES.index(forced_branch)] = 1
            return gates
        logits = self.down(nn.functional.silu(self.up(x))).unflatten(-1, (self.num_heads, len(BRANCHES)))
        logits = logits.to(torch.promote_types(x.dtype, torch.float32)) / self.temperature
        gates = logits.softmax(dim=-1) if self.kind == "softmax" else logits.sigmoid()
        return gates.to(x.dtype)
