"""The door of the operator: every bad input is a ValueError that names the numbers; odd but legal input works."""

import pytest
import torch

from nsa import (
    BlockGeometry,
    NSACache,
    compressed_attention,
    mean_pool,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=20)


def inputs(**changes):
    """Legal arguments of nsa_attention; `changes` replaces some."""
    arguments = {
        "q": torch.randn(1, 40, 4, 8),
        "k": torch.randn(1, 40, 2, 8),
        "v": torch.randn(1, 40, 2, 6),
        "k_cmp": torch.randn(1, 9, 2, 8),
        "v_cmp": torch.randn(1, 9, 2, 6),
        "gates": torch.rand(1, 40, 4, 3),
        "geometry": GEOMETRY,
    }
    return {**arguments, **changes}


def cu(*bounds: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(bounds, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(40, 4, 8)}, r"q must be \[B, T, H, Dk\], 4 dimensions, not \[40, 4, 8\]"),
        ({"q": torch.randn(1, 40, 5, 8)}, "5 query heads must be a multiple of the 2"),
        ({"q": torch.randn(1, 40, 4, 10)}, "q has head size 10 but k has 8"),
        ({"q": torch.randn(2, 40, 4, 8)}, "batch 2"),
        ({"q": torch.randint(5, (1, 40, 4, 8))}, "not torch.int64"),
        ({"k": torch.randn(1, 40, 2, 8).double()}, "k is torch.float64 but q is torch.float32"),
        ({"k": torch.randn(1, 40, 2, 8, device="meta")}, "k is on meta but q is on cpu"),
        ({"k": torch.randn(1, 39, 2, 8)}, r"k is \[1, 39, 2, 8\] but v is \[1, 40, 2, 6\]"),
        ({"k": torch.randn(1, 39, 2, 8), "v": torch.randn(1, 39, 2, 6)}, "39 tokens, expected 40"),
        ({"k_cmp": torch.randn(1, 8, 2, 8), "v_cmp": torch.randn(1, 8, 2, 6)}, "8 tokens, expected 9"),
        ({"v_cmp": torch.randn(1, 9, 2, 8)}, "one head size, not 6, 8 and 6"),
        ({"k_cmp": torch.randn(1, 9, 1, 8), "v_cmp": torch.randn(1, 9, 1, 6)}, "not 2, 1 and 2"),
        ({"gates": torch.rand(1, 40, 4, 2)}, r"gates must be \[1, 40, 4, 3\]"),
        ({"gates": torch.rand(1, 40, 12)}, r"gates must be \[B, T, H, 3\]"),
        ({"gates": torch.rand(1, 40, 4, 3, device="meta")}, "gates is on meta"),
        ({"cu_seqlens": cu(0, 10, 30)}, "from 0 to 30 but q has 40"),
        ({"cu_seqlens": cu(0, 10, 50)}, "from 0 to 50 but q has 40"),
        ({"cu_seqlens": cu(1, 40)}, "from 1 to 40"),
        ({"cu_seqlens": cu(0, 30, 20, 40)}, "must not decrease, but entry 2 is 20 after 30"),
        ({"cu_seqlens": cu(0, 40, dtype=torch.int64)}, "int32"),
        ({"cu_seqlens": cu(40)}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32, device="meta")}, "cu_seqlens is on meta"),
        ({"backend": "cuda"}, "'cuda' is unknown"),
        ({"backend": "triton"}, "'triton' cannot run here"),
    ],
)
def test_bad_input_names_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        nsa_attention(**inputs(**changes))


def test_packed_batches_are_refused_with_the_remedy():
    arguments = {name: x.expand(2, *x.shape[1:]) for name, x in inputs().items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError, match="flatten the batch"):
        nsa_attention(**arguments, geometry=GEOMETRY, cu_seqlens=cu(0, 40))


def test_bad_stage_arguments():
    q, k, v = torch.randn(1, 10, 4, 8), torch.randn(1, 30, 2, 8), torch.randn(1, 30, 2, 6)
    with pytest.raises(ValueError, match="30 tokens, expected 10"):
        selected_attention(q, k, v, torch.zeros(1, 10, 2, 4, dtype=torch.int32), GEOMETRY)
    with pytest.raises(ValueError, match=r"int32 \[1, 10, 2, 4\]"):
        selected_attention(q, k, v, torch.zeros(1, 10, 2, 4), GEOMETRY, q_start=20)
    with pytest.raises(ValueError, match="never negative"):
        selected_attention(q, k, v, torch.zeros(1, 10, 2, 4, dtype=torch.int32), GEOMETRY, q_start=-20)
    with pytest.raises(ValueError, match="miss part of the first query's window"):
        window_attention(q, k[:, :28], v[:, :28], GEOMETRY, q_start=40, k_start=22)
    with pytest.raises(ValueError, match=r"lse must be \[1, 10, 4\]"):
        select_blocks(q, k[:, :1], torch.zeros(1, 10, 2), GEOMETRY)
    with pytest.raises(ValueError, match="never negative"):
        compressed_attention(q, k[:, :1], v[:, :1], GEOMETRY, q_start=4, cu_seqlens=cu(0, 10))
    with pytest.raises(ValueError, match="must be 6 for 30 tokens, not 7"):
        mean_pool(k, GEOMETRY, num_compressed=7)
    with pytest.raises(ValueError, match="packed documents have 2"):
        compressed_attention(q, k[:, :1], v[:, :1], BlockGeometry(4, 4, 4, 4), cu_seqlens=cu(0, 10))


def test_decode_refuses_a_view_of_another_step():
    cache, kv = NSACache(GEOMETRY), torch.randn(2, 5, 2, 8)

    def unreachable(*_):
        raise AssertionError

    view = cache.append((kv, kv), (kv, kv), (kv, kv), unreachable)
    with pytest.raises(ValueError, match="the append of these tokens"):
        nsa_decode(torch.randn(2, 1, 4, 8), view, torch.rand(2, 1, 4, 3), GEOMETRY)
    with pytest.raises(ValueError, match="gates must be"):
        nsa_decode(torch.randn(2, 5, 4, 8), view, torch.rand(2, 5, 4), GEOMETRY)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_very_short_sequences(backend, length):
    q, k, v = (torch.randn(2, length, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    pooled = [mean_pool(x, GEOMETRY, backend=backend) for x in (k, v)]
    out = nsa_attention(q, k, v, *pooled, torch.rand(2, length, 4, 3), GEOMETRY, backend=backend)
    assert out.shape == (2, length, 4, 8)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_large_logits_do_not_overflow(backend):
    q, k = 300 * torch.randn(1, 70, 4, 8), 300 * torch.randn(1, 70, 2, 8)
    v = torch.randn(1, 70, 2, 8)
    pooled = [mean_pool(x, GEOMETRY, backend=backend) for x in (k, v)]
    tensors = [q, k, v, *pooled]
    for x in tensors:
        x.requires_grad_()
    out = nsa_attention(*tensors, torch.rand(1, 70, 4, 3), GEOMETRY, backend=backend)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)
