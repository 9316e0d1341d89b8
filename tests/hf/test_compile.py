"""torch.compile: one graph for the first length, one for all others, no breaks, and the results of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nsa import BlockGeometry, NSAAttention, mean_pool, nsa_attention
from tiny_models import tiny_model

GEOMETRY = BlockGeometry(8, 4, 8, 3, window_size=8)
LENGTHS = (33, 41, 57, 64, 90)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(program, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(program, backend=counter, fullgraph=True), counter


def operator(q, k, gates):
    return nsa_attention(q, k, k, mean_pool(k, GEOMETRY), mean_pool(k, GEOMETRY), gates, GEOMETRY)


def heads(batch, length):
    return torch.randn(batch, length, 4, 8), torch.randn(batch, length, 2, 8), torch.rand(batch, length, 4, 3)


def test_the_operator_has_two_graphs_for_all_lengths_and_batches():
    run, counter = compiled(operator)
    for batch, length in zip((3, 2, 5, 4, 2), LENGTHS, strict=True):
        inputs = heads(batch, length)
        torch.testing.assert_close(run(*inputs), operator(*inputs), rtol=0, atol=0)
    assert counter.frame_count == 2


def test_the_operator_has_one_graph_where_its_length_is_marked_as_dynamic():
    run, counter = compiled(operator)
    for length in LENGTHS:
        inputs = heads(2, length)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(run(*inputs), operator(*inputs), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_the_module_has_two_graphs_for_all_lengths():
    module = NSAAttention(32, 4, 2, geometry=GEOMETRY, compression="mlp", compress_rope="after")
    run, counter = compiled(module)
    for length in LENGTHS[:4]:
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x), module(x), rtol=0, atol=1e-6)
    assert counter.frame_count == 2


def padded(ids):
    ids = ids.expand(2 + ids.shape[1] % 3, -1)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(ids):
    ends = {33: [12], 41: [5, 40], 57: [5, 5, 30]}[ids.shape[1]]
    bounds = torch.tensor([0, *ends, ids.shape[1]], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in bounds.diff()])[None]
    return {"input_ids": ids, "cu_seq_lens_q": bounds, "position_ids": positions, "labels": ids}


@pytest.mark.parametrize("kind", [padded, packed])
def test_training_the_model_has_two_graphs_for_all_batches(kind):
    model = tiny_model("nsa")
    run, counter = compiled(model, "aot_eager")
    for length in LENGTHS[:3]:
        batch = kind(torch.randint(0, 61, (1, length)))
        results = []
        for forward in (model, run):
            model.zero_grad()
            loss = forward(**batch).loss
            loss.backward()
            results.append((loss, [parameter.grad for parameter in model.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 2
