"""The reference, and the operator on every CPU backend, against the oracle of counted positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from drawing import Problem, problems
from nsa import BlockGeometry, mean_pool, nsa_attention, select_blocks
from oracle import compressed_tokens, document

BACKENDS = ["reference", "torch"]


def operator(problem: Problem, backend: str, **changes):
    p = {name: changes.get(name, getattr(problem, name)) for name in ("q", "k", "v", "k_win", "v_win", "gates")}
    k_cmp, v_cmp = (mean_pool(p[n], problem.geometry, problem.cu_seqlens, backend=backend) for n in ("k", "v"))
    return nsa_attention(
        *(p["q"], p["k"], p["v"], k_cmp, v_cmp, p["gates"], problem.geometry),
        k_win=p["k_win"],
        v_win=p["v_win"],
        cu_seqlens=problem.cu_seqlens,
        backend=backend,
        return_aux=True,
    )


def bounds(problem: Problem):
    """(row, start, end) of every document."""
    if problem.lengths is None:
        return [(b, 0, problem.q.shape[1]) for b in range(problem.q.shape[0])]
    ends = np.cumsum(problem.lengths)
    return [(0, int(end) - length, int(end)) for end, length in zip(ends, problem.lengths, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_operator_and_every_branch_equal_the_oracle(backend, problem):
    out, aux = operator(problem, backend)
    geo, scale = problem.geometry.as_tuple(), problem.q.shape[-1] ** -0.5
    for b, start, end in bounds(problem):
        part = {n: getattr(problem, n)[b, start:end].numpy() for n in ("q", "k", "v", "k_win", "v_win", "gates")}
        groups = range(problem.k.shape[2])
        k_cmp, v_cmp = (np.stack([compressed_tokens(part[n][:, g], geo) for g in groups], axis=1) for n in ("k", "v"))
        expected = document(
            *(part["q"], part["k"], part["v"], k_cmp, v_cmp, part["k_win"], part["v_win"], part["gates"], geo, scale)
        )
        outs, lses, blocks = expected
        np.testing.assert_allclose(out[b, start:end], outs["all"], atol=1e-9)
        for name in ("cmp", "slc", "win"):
            np.testing.assert_allclose(getattr(aux, f"lse_{name}")[b, start:end], lses[name], atol=1e-9)
            one_hot = torch.zeros_like(problem.gates)
            one_hot[..., ("cmp", "slc", "win").index(name)] = 1
            alone, _ = operator(problem, backend, gates=one_hot)
            np.testing.assert_allclose(alone[b, start:end], outs[name], atol=1e-9)
        got = aux.block_indices[b, start:end].tolist()
        for t in range(end - start):
            for g in groups:
                assert [j for j in got[t][g] if j >= 0] == blocks[t][g]
                assert got[t][g] == blocks[t][g] + [-1] * (geo[3] - len(blocks[t][g]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend):
    geometry = BlockGeometry(4, 4, 4, num_selected_blocks=4, num_init_blocks=1, num_local_blocks=1, window_size=4)
    q = torch.zeros(1, 40, 2, 4)  # equal logits: every complete block has the same importance
    k_cmp = torch.randn(1, 10, 1, 4)
    lse = torch.tensor([(t + 1) // 4 for t in range(40)]).float().log().view(1, 40, 1).expand(1, 40, 2)
    blocks = select_blocks(q, k_cmp, lse, geometry, backend=backend)
    assert blocks[0, 39, 0].tolist() == [0, 1, 2, 9]
    assert blocks[0, 35, 0].tolist() == [0, 1, 2, 8]
    assert blocks[0, 3, 0].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(problem=problems(max_length=30), data=st.data())
def test_no_output_depends_on_a_later_token_or_another_document(backend, problem, data):
    total = problem.q.shape[1]
    if total == 0:
        return
    t = data.draw(st.integers(0, total - 1))
    changed = {}
    for name in ("q", "k", "v", "k_win", "v_win", "gates"):
        x = getattr(problem, name).clone()
        x[:, t] += 1 + torch.rand_like(x[:, t])
        changed[name] = x
    before, _ = operator(problem, backend)
    after, _ = operator(problem, backend, **changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=0)
    for b, start, end in bounds(problem):
        if not start <= t < end:
            torch.testing.assert_close(after[b, start:end], before[b, start:end], rtol=0, atol=0)
    assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch", ["slc", "win", "cmp"])
def test_full_coverage_equals_dense_causal_attention(backend, branch):
    length = 37
    if branch == "cmp":  # one token a block
        geometry = BlockGeometry(1, 1, 4, num_selected_blocks=4, window_size=4)
    else:
        geometry = BlockGeometry(8, 4, 8, num_selected_blocks=5, window_size=length)
    q = torch.randn(2, length, 6, 8, dtype=torch.float64)
    k, v = torch.randn(2, length, 2, 8, dtype=torch.float64), torch.randn(2, length, 2, 5, dtype=torch.float64)
    gates = torch.zeros(2, length, 6, 3, dtype=torch.float64)
    gates[..., ("cmp", "slc", "win").index(branch)] = 1
    k_cmp, v_cmp = (mean_pool(x, geometry, backend=backend) for x in (k, v))
    out = nsa_attention(q, k, v, k_cmp, v_cmp, gates, geometry, backend=backend)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_group_share_keys_and_blocks(backend):
    geometry = BlockGeometry(4, 2, 8, num_selected_blocks=4, window_size=8)
    k, v = (torch.randn(1, 60, 2, 8, dtype=torch.float64) for _ in range(2))
    q = torch.randn(1, 60, 6, 8, dtype=torch.float64)
    gates = torch.rand(1, 60, 6, 3, dtype=torch.float64)
    pooled = [mean_pool(x, geometry, backend=backend) for x in (k, v)]
    out, aux = nsa_attention(q, k, v, *pooled, gates, geometry, backend=backend, return_aux=True)
    for group in range(2):
        heads = slice(3 * group, 3 * group + 3)
        one = slice(group, group + 1)
        alone, alone_aux = nsa_attention(
            *(q[:, :, heads], k[:, :, one], v[:, :, one], *(x[:, :, one] for x in pooled), gates[:, :, heads]),
            geometry,
            backend=backend,
            return_aux=True,
        )
        torch.testing.assert_close(alone, out[:, :, heads])
        assert torch.equal(alone_aux.block_indices, aux.block_indices[:, :, one])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_the_whole_operator(backend):
    torch.manual_seed(0)
    geometry = BlockGeometry(4, 2, 4, num_selected_blocks=4, window_size=5)
    lengths = [0, 13, 1, 6]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for cu, batch in ((None, 2), (cu_seqlens, 1)):
        total = sum(lengths)
        q = torch.randn(batch, total, 4, 3, dtype=torch.float64)
        k, k_win = (torch.randn(batch, total, 2, 3, dtype=torch.float64) for _ in range(2))
        v, v_win = (torch.randn(batch, total, 2, 2, dtype=torch.float64) for _ in range(2))
        gates = torch.rand(batch, total, 4, 3, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (q, k, v, k_win, v_win, gates)]

        def run(q, k, v, k_win, v_win, gates, cu=cu):
            pooled = [mean_pool(x, geometry, cu, backend=backend) for x in (k, v)]
            options = {"k_win": k_win, "v_win": v_win, "cu_seqlens": cu, "backend": backend}
            return nsa_attention(q, k, v, *pooled, gates, geometry, **options)

        assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)
