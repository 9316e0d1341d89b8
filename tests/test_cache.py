"""The cache: what it holds, what it reads, how it grows."""

import pytest
import torch

from nsa import BlockGeometry, NSAAttention, NSACache, nsa_decode

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=20)


@pytest.fixture
def module():
    torch.manual_seed(0)
    with torch.no_grad():
        yield NSAAttention(48, num_heads=4, num_kv_heads=2, geometry=GEOMETRY, backend="torch").double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mean(k, v, rows, first):
    pooled = [x.unfold(1, GEOMETRY.compress_block_size, GEOMETRY.compress_stride).mean(-1) for x in (k, v)]
    return pooled[0], pooled[1]


def test_the_view_holds_what_was_appended():
    k, v, k_win, v_win, k_raw, v_raw = (random(2, 300, 2, 6) for _ in range(6))
    cache, length = NSACache(GEOMETRY), 0
    for size in [5, 1, 1, 1, 100, *[1] * 60, 90, *[1] * 42]:
        part = slice(length, length + size)
        view = cache.append(
            (k[:, part], v[:, part]), (k_win[:, part], v_win[:, part]), (k_raw[:, part], v_raw[:, part]), mean
        )
        length += size
        assert view.lengths == (length, length)
        assert torch.equal(view.k[:, :length], k[:, :length])
        assert torch.equal(view.v[:, :length], v[:, :length])
        first = max(0, length - size - GEOMETRY.window_size + 1)
        for row in range(2):
            held = slice(first - view.win_start[row], length - view.win_start[row])
            assert held.start >= 0
            assert torch.equal(view.k_win[row, held], k_win[row, first:length])
            assert torch.equal(view.v_win[row, held], v_win[row, first:length])
        count = GEOMETRY.num_compressed(length)
        if count:
            expected = mean(k_raw[:, :length], v_raw[:, :length], None, None)
            torch.testing.assert_close(view.k_cmp[:, :count], expected[0][:, :count])
            torch.testing.assert_close(view.v_cmp[:, :count], expected[1][:, :count])


def test_a_compressed_token_is_emitted_every_stride_after_the_first_block(module):
    cache, emitted = NSACache(GEOMETRY), []
    forward = module.compress_k.forward

    def counting(k, *arguments):
        out = forward(k, *arguments)
        emitted.append((sum(cache.lengths[:1]) + 1, out.shape[1]))
        return out

    module.compress_k.forward = counting
    for _ in range(30):
        module(random(1, 1, 48), cache=cache)
    assert emitted == [(8, 1), (12, 1), (16, 1), (20, 1), (24, 1), (28, 1)]


def test_storage_grows_by_doubling_and_the_window_not_at_all(module):
    cache, storages, window = NSACache(GEOMETRY), set(), set()
    x = random(1, 1, 48)
    for _ in range(1000):
        module(x, cache=cache)
        storages.add(cache._raw.pair[0].data_ptr())
        window.add(cache._window.buffer.pair[0].data_ptr())
    assert len(storages) <= 8  # 16 -> 1024 tokens in doublings, so that a token is copied at most twice
    assert len(window) == 1
    assert cache._window.buffer.pair[0].shape[2] <= 2 * GEOMETRY.window_size


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_counters_equal_the_tokens_that_a_step_touches(module, backend):
    """Poison every token that the counters do not name: the result must not move, and each named one must matter."""
    module.backend = backend
    cache = NSACache(GEOMETRY)
    module(random(1, 150, 48), cache=cache)
    q, gates = random(1, 1, 4, 12), torch.full((1, 1, 4, 3), 1 / 3, dtype=torch.float64)
    pair = (random(1, 1, 2, 12), random(1, 1, 2, 12))
    view = cache.append(pair, pair, pair, mean)
    out, aux = nsa_decode(q, view, gates, GEOMETRY, backend=backend, return_aux=True)
    cache.last_block_indices = aux.block_indices
    reads, length = cache.reads, 151
    touched = {"slc": 0, "win": 0, "cmp": 0}

    def moves(name: str, index: int) -> bool:
        poisoned = getattr(view, name).clone()
        poisoned[:, index] += 100.0
        return not torch.equal(nsa_decode(q, view._replace(**{name: poisoned}), gates, GEOMETRY, backend=backend), out)

    for group in range(2):
        one = 0
        for t in range(length):
            poisoned = view.v.clone()
            poisoned[:, t, group] += 100.0
            one += not torch.equal(nsa_decode(q, view._replace(v=poisoned), gates, GEOMETRY, backend=backend), out)
        touched["slc"] = max(touched["slc"], one)
    touched["win"] = sum(moves("v_win", i) for i in range(view.v_win.shape[1]))
    touched["cmp"] = sum(moves("v_cmp", i) for i in range(view.v_cmp.shape[1]))
    assert {name: values[0] for name, values in reads.done.items()} == touched
    assert reads.predicted == {"cmp": [36], "slc": [64], "win": [20]}
    assert all(reads.done[name][0] <= reads.predicted[name][0] for name in touched)
    assert {branch: values[0] for branch, values in reads.predicted.items()} == GEOMETRY.predicted_reads(length)


def test_reads_before_a_step_are_an_error(module):
    with pytest.raises(ValueError, match="no decode step"):
        _ = NSACache(GEOMETRY).reads


def test_reorder_and_repeat_follow_the_rows(module):
    x, more = random(3, 61, 48), random(3, 30, 48)
    cache = NSACache(GEOMETRY)
    module(x, cache=cache, num_new=[61, 40, 3])
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.lengths == (3, 61, 61)
    expected = torch.cat(
        [module(torch.cat([x[2:, :3], more[:1]], 1))[:, 3:], module(torch.cat([x[[0, 0]], more[1:]], 1))[:, 61:]]
    )
    got = torch.cat([module(more[:, t : t + 1], cache=cache) for t in range(30)], dim=1)
    torch.testing.assert_close(got, expected)

    cache = NSACache(GEOMETRY)
    module(x[:2], cache=cache)
    cache.repeat(2)
    expected = module(torch.cat([x[[0, 0, 1, 1]], more[:1, :5].expand(4, -1, -1)], dim=1))[:, 61:]
    torch.testing.assert_close(module(more[:1, :5].expand(4, -1, -1), cache=cache), expected)


def test_reset_starts_again(module):
    cache, x = NSACache(GEOMETRY), random(1, 50, 48)
    first = module(x, cache=cache)
    cache.reset()
    assert cache.lengths == ()
    assert torch.equal(module(x, cache=cache), first)


def test_bad_appends_name_the_numbers(module):
    cache = NSACache(GEOMETRY)
    module(random(2, 5, 48), cache=cache)
    with pytest.raises(ValueError, match="holds 2 rows but 3"):
        module(random(3, 5, 48), cache=cache)
    with pytest.raises(ValueError, match=r"0\.\.5 for each of 2 rows, not \[6, 1\]"):
        module(random(2, 5, 48), cache=cache, num_new=[6, 1])
    assert cache.lengths == (5, 5)
