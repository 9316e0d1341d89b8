"""`NSAAttention` in a small Transformer of plain PyTorch, trained for a few steps on the bytes of this file.

python examples/plain_pytorch.py
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from nsa import BlockGeometry, NSAAttention

VOCABULARY, WIDTH, LENGTH, ROWS = 256, 64, 128, 8


class Block(nn.Module):
    """Attention and MLP; the attention is the only line that differs from a dense Transformer."""

    def __init__(self) -> None:
        super().__init__()
        geometry = BlockGeometry(
            compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=6, window_size=32
        )
        self.attention = NSAAttention(WIDTH, num_heads=4, num_kv_heads=2, geometry=geometry)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def batch(text: Tensor) -> Tensor:
    """Pieces of the text from random places, `[ROWS, LENGTH + 1]`."""
    start = torch.randint(len(text) - LENGTH, (ROWS, 1))
    return text[start + torch.arange(LENGTH + 1)]


def main(steps: int = 30) -> list[float]:
    """Train and return the losses."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        tokens = batch(text)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
