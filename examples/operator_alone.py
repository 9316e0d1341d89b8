"""The operator without any module: queries, keys, values and gates in, attention out.

python examples/operator_alone.py
"""

import torch

from nsa import BlockGeometry, mean_pool, nsa_attention


def main() -> None:
    torch.manual_seed(0)
    geometry = BlockGeometry()  # the paper's: l=32, d=16, l'=64, n=16, w=512
    tokens, heads, groups, head_dim = 4096, 8, 2, 64
    q = torch.randn(1, tokens, heads, head_dim, requires_grad=True)
    k = torch.randn(1, tokens, groups, head_dim, requires_grad=True)
    v = torch.randn(1, tokens, groups, head_dim, requires_grad=True)
    gates = torch.full((1, tokens, heads, 3), 1 / 3)  # compressed, selected, window

    k_cmp, v_cmp = mean_pool(k, geometry), mean_pool(v, geometry)
    out, aux = nsa_attention(q, k, v, k_cmp, v_cmp, gates, geometry, return_aux=True)
    out.square().mean().backward()

    print(f"output {list(out.shape)}, {k_cmp.shape[1]} compressed tokens for {tokens}")
    print(
        f"blocks of {geometry.select_block_size} that the last query selected: {aux.block_indices[0, -1, 0].tolist()}"
    )
    reads = sum(geometry.predicted_reads(tokens).values())
    print(f"reads of the last query: {reads} tokens at most, dense attention {tokens}")
    print(f"gradients: q {q.grad.norm():.2e}, k {k.grad.norm():.2e}, v {v.grad.norm():.2e}")


if __name__ == "__main__":
    main()
