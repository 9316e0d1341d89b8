"""The module: causality, gradients, routes that agree, options."""

import itertools

import pytest
import torch
from torch import nn

from nsa import BlockGeometry, NSAAttention, NSACache

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=20)
OPTIONS = [
    {"compression": compression, "compress_rope": rope, "shared_kv": shared}
    for compression, rope, shared in itertools.product(["mean", "conv", "mlp"], ["before", "after"], [False, True])
]


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer(backend: str = "torch", **options) -> NSAAttention:
    """A layer away from its zero-initialised start."""
    module = NSAAttention(48, num_heads=4, num_kv_heads=2, geometry=GEOMETRY, backend=backend, **options)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return module


def decode(module: NSAAttention, x: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache, outs, start = NSACache(module.geometry), [], 0
    for size in chunks:
        outs.append(module(x[:, start : start + size], cache=cache))
        start += size
    assert start == x.shape[1]
    return torch.cat(outs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_chunked_prefill_and_decode_agree(options, backend):
    module, x = layer(backend, **options), torch.randn(2, 90, 48)
    full = layer_output = module(x)
    for chunks in ([90], [37, 40, 13], [50] + [1] * 40, [1] * 20 + [70], [3, 60, 27]):
        torch.testing.assert_close(decode(module, x, chunks), full, msg=lambda m, c=chunks: f"chunks {c}: {m}")
    assert layer_output.shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_ragged_rows_decode_like_rows_alone(options, backend):
    module, x = layer(backend, **options), torch.randn(3, 120, 48)
    full = module(x)
    cache, position = NSACache(GEOMETRY), [0, 0, 0]
    got = [[], [], []]
    for num_new in [(61, 7, 0), (1, 2, 1), (0, 5, 44), (20, 0, 1), *[(1, 1, 1)] * 25]:
        chunk = torch.randn(3, max(num_new), 48)  # padding is arbitrary
        for row, new in enumerate(num_new):
            chunk[row, :new] = x[row, position[row] : position[row] + new]
        out = module(chunk, cache=cache, num_new=num_new)
        for row, new in enumerate(num_new):
            got[row].append(out[row, :new])
            position[row] += new
    assert cache.lengths == tuple(position)
    for row in range(3):
        torch.testing.assert_close(torch.cat(got[row]), full[row, : position[row]])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("compression", ["mean", "conv", "mlp"])
@pytest.mark.parametrize("bounds", [[0, 4], [0, 7], [0, 2, 7], [0, 3, 8]])
def test_packed_documents_may_be_shorter_together_than_a_compressed_block(bounds, compression, backend):
    module, x = layer(backend, compression=compression), torch.randn(1, bounds[-1], 48)
    alone = torch.cat([module(x[:, start:stop]) for start, stop in itertools.pairwise(bounds)], dim=1)
    packed = module(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    torch.testing.assert_close(packed, alone)
    packed.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_documents_equal_documents_alone(options, backend):
    module, x = layer(backend, **options), torch.randn(1, 130, 48)
    cu_seqlens = torch.tensor([0, 0, 3, 60, 61, 130, 130], dtype=torch.int32)
    packed = module(x, cu_seqlens=cu_seqlens)
    alone = [module(x[:, a:b]) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["full", "chunked", "packed"])
def test_future_tokens_move_nothing_before_them(options, mode):
    module, x = layer(**options), torch.randn(1, 70, 48)

    def run(x):
        if mode == "chunked":
            return decode(module, x, [20, 30, *[1] * 20])
        cu_seqlens = torch.tensor([0, 25, 70], dtype=torch.int32) if mode == "packed" else None
        return module(x, cu_seqlens=cu_seqlens)

    before = run(x)
    for t in (0, 7, 8, 24, 25, 31, 48, 69):
        changed = x.clone()
        changed[:, t:] = torch.randn(1, 70 - t, 48)
        after = run(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_gets_a_finite_gradient(options, gate, backend):
    module = layer(backend, gate=gate, bias=True, **options)
    for cu_seqlens in (None, torch.tensor([0, 11, 64], dtype=torch.int32)):
        module.zero_grad()
        (module(torch.randn(1, 64, 48), cu_seqlens=cu_seqlens) * torch.randn(1, 64, 48)).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_branches_start_equal():
    module = NSAAttention(48, num_heads=4, num_kv_heads=2)
    gates = module.gate(torch.randn(1, 5, 48))
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 3))


@torch.no_grad()
def test_forced_branch_is_that_branch_alone_and_can_change_at_run_time():
    module, x = layer(), torch.randn(1, 60, 48)
    free = module(x)
    alone = {}
    for branch in ("cmp", "slc", "win"):
        module.forced_branch = branch
        alone[branch] = module(x)
    assert not torch.equal(alone["slc"], alone["win"])
    # The first compress_block_size - 1 queries see no compressed token, so that branch alone gives them nothing.
    assert not alone["cmp"][:, :7].any()
    assert alone["cmp"][:, 7:].any(dim=-1).all()
    module.forced_branch = None
    assert torch.equal(module(x), free)
    module.forced_branch = "window"
    with pytest.raises(ValueError, match="'window'"):
        module(x)


@torch.no_grad()
def test_the_module_is_invariant_under_a_shift_of_positions():
    """RoPE is relative for every head: documents far from position 0 give the same result."""
    module, x = layer(shared_kv=True), torch.randn(1, 60, 48)
    assert module.rope is not None
    for shift in (1, 17, 1000):
        moved = module(x, position_embeddings=module.rope(torch.arange(60).unsqueeze(0) + shift, torch.float64))
        torch.testing.assert_close(moved, module(x))


@torch.no_grad()
def test_two_layers_with_different_geometry_work_side_by_side():
    first, x = layer(), torch.randn(1, 80, 48)
    alone = first(x)
    second = NSAAttention(48, num_heads=4, num_kv_heads=1, geometry=BlockGeometry(4, 2, 6, 3, window_size=3))
    second(x)
    assert torch.equal(first(x), alone)


@torch.no_grad()
def test_aux_sink_sees_the_chosen_blocks_and_changes_nothing():
    module, x = layer(), torch.randn(1, 60, 48)
    plain, seen = module(x), []
    module.aux_sink = seen.append
    assert torch.equal(module(x), plain)
    assert seen[0].block_indices.shape == (1, 60, 2, GEOMETRY.num_selected_blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(dtype):
    module = layer().to(dtype)
    x = torch.randn(1, 40, 48, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    out.sum().backward()
    with torch.no_grad():
        assert decode(module, x, [30, *[1] * 10]).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "6 .* 4"),
        ({"num_heads": 0, "num_kv_heads": 1}, "num_heads 0"),
        ({"num_heads": 5, "num_kv_heads": 1}, "48 .* 5"),
        ({"compression": "max"}, "'max'"),
        ({"compress_rope": "never"}, "'never'"),
        ({"gate": "relu"}, "'relu'"),
        ({"gate_temperature": 0.0}, "0.0"),
        ({"head_dim": 7}, "even, not 7"),
    ],
)
def test_bad_options_name_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        NSAAttention(48, **{"num_heads": 4, "num_kv_heads": 2, **arguments})


def test_bad_calls_say_what_to_do():
    module, x = layer(), torch.randn(1, 20, 48)
    with pytest.raises(ValueError, match=r"x must be \[B, T, 48\], not \[1, 20, 32\]"):
        module(x[..., :32])
    with pytest.raises(ValueError, match="no_grad"):
        module(x, cache=NSACache(GEOMETRY))
    with torch.no_grad():
        with pytest.raises(ValueError, match="rows of a batch"):
            module(x, cache=NSACache(GEOMETRY), cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
        with pytest.raises(ValueError, match="position_embeddings"):
            NSAAttention(48, num_heads=4, num_kv_heads=2, rope_base=None)(x)
        with pytest.raises(ValueError, match="goes with a cache"):
            module(x, num_new=[20])
