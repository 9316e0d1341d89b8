"""Whatever way tokens take through the model (whole, padded, packed, in chunks, one by one), the result is the same."""

import pytest
import torch

from tiny_models import left_padded, tiny_model

LAYERS = [
    ("nsa", "nsa"),
    ("full_attention", "nsa"),
    ("nsa", "sliding_attention"),
    ("sliding_attention", "full_attention"),
]
LENGTHS = [70, 41, 3]
CHUNKS = [[70], [1, 30, 5, 34], [50, *[1] * 20], [25, 30, *[1] * 15]]


@pytest.fixture(params=LAYERS, ids="-".join)
def model(request):
    with torch.no_grad():
        yield tiny_model(*request.param)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(61, (n,), generator=generator) for n in LENGTHS]


def alone(model, rows):
    return [model(row[None], use_cache=False).logits[0] for row in rows]


def in_chunks(model, ids, mask, chunks):
    cache, parts, start = None, [], 0
    for size in chunks:
        seen = None if mask is None else mask[:, : start + size]
        out = model(ids[:, start : start + size], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        parts.append(out.logits)
    assert start == ids.shape[1] == cache.get_seq_length()
    return torch.cat(parts, dim=1)


def test_each_row_of_a_left_padded_batch_equals_that_row_alone(model, rows):
    ids, mask = left_padded(rows)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row, single in zip(logits, alone(model, rows), strict=True):
        assert torch.allclose(row[-len(single) :], single, atol=1e-10)
        assert not row[: -len(single)].any()


def test_each_row_of_a_right_padded_batch_equals_that_row_alone(model, rows):
    ids, mask = (x.flip(1) for x in left_padded([row.flip(0) for row in rows]))
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row, single in zip(logits, alone(model, rows), strict=True):
        assert torch.allclose(row[: len(single)], single, atol=1e-10)
        assert not row[len(single) :].any()


def test_packed_documents_equal_each_document_alone(model, rows):
    rows = [rows[1], rows[2], rows[2][:0], rows[0], rows[1][:30]]
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)
    packed = model(torch.cat(rows)[None], cu_seqlens=cu_seqlens).logits[0]
    expected = torch.cat(alone(model, [row for row in rows if len(row)]))
    assert torch.allclose(packed, expected, atol=1e-10)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_and_single_tokens_from_a_cache_equal_the_whole(model, rows, chunks):
    ids = torch.stack([rows[0], rows[0].flip(0)])
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(in_chunks(model, ids, None, chunks), expected, atol=1e-10)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_a_left_padded_batch_in_chunks_equals_the_rows_alone(model, rows, chunks):
    ids, mask = left_padded(rows)
    logits = in_chunks(model, ids, mask, chunks)
    for row, single in zip(logits, alone(model, rows), strict=True):
        assert torch.allclose(row[-len(single) :], single, atol=1e-10)


def test_rows_padded_on_the_right_go_on_decoding_at_their_own_length(model, rows):
    ids, mask = (x.flip(1) for x in left_padded([row.flip(0) for row in rows]))
    out = model(ids, attention_mask=mask, use_cache=True)
    following = torch.tensor([[7], [8], [9]])
    mask = torch.cat([mask, torch.ones_like(following)], dim=1)
    logits = model(following, attention_mask=mask, past_key_values=out.past_key_values).logits
    extended = [torch.cat([row, new]) for row, new in zip(rows, following, strict=True)]
    for row, single in zip(logits, alone(model, extended), strict=True):
        assert torch.allclose(row[-1], single[-1], atol=1e-10)


def test_no_later_token_moves_an_earlier_output(model, rows):
    """Perturb each of some future tokens, in every mode; outputs before it stay, those at it move."""
    row = rows[0]

    def modes(row):
        ids, mask = left_padded([row, row[:30]])
        both = torch.cat([row, row[:25]])
        yield model(row[None], use_cache=False).logits[0]
        yield in_chunks(model, row[None], None, [20, *[1] * 9, 41])[0]
        yield model(both[None], cu_seqlens=torch.tensor([0, 70, 95], dtype=torch.int32)).logits[0, :70]
        yield model(both[None], cu_seqlens=torch.tensor([0, 70, 95], dtype=torch.int32)).logits[0, 70:]
        yield in_chunks(model, ids, mask, [50, *[1] * 5, 15])[0]
        yield model(ids, attention_mask=mask).logits[1, -30:]

    before = list(modes(row))
    for position in (12, 33, 69):
        other = row.clone()
        other[position] = (row[position] + 17) % 61
        for old, new in zip(before, modes(other), strict=True):
            assert torch.allclose(old[:position], new[:position], atol=1e-11)
            assert len(old) <= position or not torch.allclose(old[position], new[position], atol=1e-4)


def test_documents_are_found_in_positions_that_restart_and_in_collator_arguments(model, rows):
    ids = torch.cat(rows)[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    expected = model(ids, cu_seqlens=bounds).logits
    assert torch.equal(model(ids, position_ids=positions).logits, expected)
    ones = torch.ones_like(ids)
    assert torch.equal(model(ids, position_ids=positions, attention_mask=ones).logits, expected)
    assert torch.equal(model(ids.int(), position_ids=positions.int(), attention_mask=ones.int()).logits, expected)
    assert torch.equal(model(ids, cu_seqlens=bounds.long()).logits, expected)
    assert torch.equal(model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=70).logits, expected)


def test_hidden_states_of_padded_rows_stand_where_their_tokens_do(model, rows):
    ids, mask = left_padded(rows)
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    single = model(rows[1][None], output_hidden_states=True).hidden_states
    assert len(padded) == len(single) == model.config.num_hidden_layers + 1
    for a, b in zip(padded, single, strict=True):
        assert torch.allclose(a[1, -len(rows[1]) :], b[0], atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "has holes"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"must be \[B, T\]"),
        ({"attention_mask": torch.ones(1, 4)}, r"give \[1, 5\]"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4, 5]])}, "give 1 to token 0 of row 0, whose position is 0"),
        ({"position_ids": torch.tensor([[0, 1, 0, 2, 3]])}, "give 2 to token 3 of row 0, whose position is 1"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3]])}, "position_ids must be"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
            r"flatten the batch to \[1, B\*T\], leave attention_mask out, .* would let the documents see each other",
        ),
        (
            {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]]), "position_ids": torch.arange(5)[None]},
            "give 2 to token 2 of row 0, whose position is 0",
        ),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "from 0 to 4 but input_ids has 5"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "use_cache": True}, "packed documents have no cache"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "exactly one of"),
        ({"output_attentions": True}, "output_attentions is not supported"),
    ],
)
def test_arguments_that_contradict_the_tokens_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(1, 5, dtype=torch.long), **arguments)


def test_a_mask_that_changes_its_mind_about_cached_tokens_is_refused():
    model, ids = tiny_model(), torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="marks 5 of the cached columns as real, but the cache holds 3"):
            model(ids[:, :1], attention_mask=torch.ones(1, 6), past_key_values=cache)
