"""The compression operators: their start, their blocks, packed documents."""

import pytest
import torch

from nsa import BlockGeometry, mean_pool
from nsa.compress import build_compression

GEOMETRY = BlockGeometry(8, 4, 16, 4)
KINDS = ["mean", "conv", "mlp"]


def test_conv_starts_as_the_mean():
    x = torch.randn(2, 50, 2, 6)
    conv = build_compression("conv", GEOMETRY, 2, 6)
    torch.testing.assert_close(conv(x), mean_pool(x, GEOMETRY))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_token_sees_its_block_and_nothing_else(kind):
    operator = build_compression(kind, GEOMETRY, 2, 6)
    x = torch.randn(1, 50, 2, 6)
    before = operator(x)
    assert before.shape == (1, 11, 2, 6)
    for t in (0, 3, 8, 31, 47, 48, 49):
        changed = x.clone()
        changed[:, t] += 1
        moved = (operator(changed) != before).any(dim=3).any(dim=2)[0]
        assert moved.tolist() == [i * 4 <= t < i * 4 + 8 for i in range(11)]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_compressed_alone(kind):
    operator = build_compression(kind, GEOMETRY, 2, 6)
    x = torch.randn(1, 60, 2, 6)
    cu_seqlens = torch.tensor([0, 0, 5, 13, 33, 60], dtype=torch.int32)
    packed = operator(x, cu_seqlens, 15)
    alone = torch.cat([operator(x[:, a:b]) for a, b in zip([0, 5, 13, 33], [5, 13, 33, 60], strict=True)], dim=1)
    assert packed.shape[1] == 15
    torch.testing.assert_close(packed[:, : alone.shape[1]], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 7])
def test_less_than_a_block_gives_nothing(kind, length):
    assert build_compression(kind, GEOMETRY, 2, 6)(torch.randn(1, length, 2, 6)).shape == (1, 0, 2, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_pack_gives_nothing_visible(kind):
    out = build_compression(kind, GEOMETRY, 2, 6)(torch.randn(1, 3, 2, 6), torch.tensor([0, 3], dtype=torch.int32), 0)
    assert out.shape == (1, 0, 2, 6)


def test_unknown_operator():
    with pytest.raises(ValueError, match="'median'"):
        build_compression("median", GEOMETRY, 2, 6)
