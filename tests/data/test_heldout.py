"""The choice of held-out documents is by name, stable, and never empty by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa.data import ByteTokenizer, DataConfig, DataError, Documents, build_train_loader, open_corpus
from nsa.data.heldout import heldout_rule, with_end_apart

NAMES = ["1790 A", "1790 B", "1791 A", "a[1].txt", "a1.txt"]


def held_of(names: list[str], heldout: list[str] | float) -> list[str]:
    """Which of documents of these names are held out."""
    return list(filter(heldout_rule(Documents(names, ["text"] * len(names)), heldout), names))


@pytest.mark.parametrize(
    ("heldout", "expected"),
    [
        (["1790 A"], [0]),
        (["1790 *"], [0, 1]),
        (["* A", "1790 B"], [0, 1, 2]),
        (["a[1].txt"], [3]),
        (["a?.txt"], [4]),
        ([], []),
        (0.0, []),
    ],
)
def test_names_and_patterns_choose(heldout: list[str] | float, expected: list[int]) -> None:
    assert held_of(NAMES, heldout) == [NAMES[index] for index in expected]


def test_a_fraction_depends_on_the_names_alone() -> None:
    names = [f"document {index}" for index in range(2000)]
    chosen = set(held_of(names, 0.1))
    assert 150 < len(chosen) < 250
    shuffled = [*names[1000:1900], "other", *names[:1000]]
    again = set(held_of(shuffled, 0.1))
    assert again - {"other"} == {name for name in chosen if name in shuffled}
    assert chosen < set(held_of(names, 0.2))
    assert held_of(["1829 Andrew Jackson", "1830 Andrew Jackson"], 0.05) == ["1829 Andrew Jackson"]


@pytest.mark.parametrize(
    ("heldout", "message"),
    [
        (["1790 C"], r'"1790 C" matches none of the 5 documents; nearest: \[.1790 [AB]'),
        (["1790 *", "2*"], r'"2\*" matches none'),
        (["*"], "takes all 5 documents and leaves none to train on"),
        (0.000001, r"chooses none of the 5 documents; name some in data\.heldout"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(heldout: list[str] | float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        held_of(NAMES, heldout)


@pytest.mark.parametrize(
    ("unit", "ends"),
    [
        ("line\n\nline\n\n", "\n\n"),
        ("line of words\n", "\n"),
        ("words and words ", " "),
        ("w", "w"),
        ("z\r\n\r\n", "\n"),
    ],
)
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_of_one_document_the_end_is_held_out_and_nothing_lies_across_the_cut(
    unit: str, ends: str, fraction: float
) -> None:
    whole = Documents(["novel.txt"], [unit * 400])
    parts = with_end_apart(whole, fraction)
    assert [parts[0].name, parts[1].name] == ["novel.txt", "novel.txt (end)"]
    assert parts[0].text + parts[1].text == whole[0].text
    assert parts[0].text.endswith(ends)
    assert len(parts[1].text) == pytest.approx(fraction * len(whole[0].text), rel=0.5)


def test_the_cut_lies_between_paragraphs_where_there_is_one_near() -> None:
    text = "a line\n" * 40 + "\n" + "a line\n" * 5
    assert with_end_apart(Documents(["a"], [text]), 0.1)[1].text == "a line\n" * 5
    far = "a line\n" * 10 + "\n" + "a line\n" * 80
    assert with_end_apart(Documents(["a"], [far]), 0.1)[1].text == "a line\n" * 9


def test_a_text_without_two_parts_is_refused() -> None:
    for text in ("", "word", "word" + " " * 50):
        with pytest.raises(DataError, match=r"novel is too short to hold out 0\.1"):
            with_end_apart(Documents(["novel"], [text]), 0.1)


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_corpus_of_one_text_trains_on_its_beginning_however_it_is_read(source: str, tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    text = "".join(f"Sentence {n} of a story.\n" for n in range(500))
    path.write_text(text if source == "text" else json.dumps({"text": text, "id": path.name}), encoding="utf-8")
    corpus = open_corpus(DataConfig(source=source, paths=(str(path),), heldout=0.1, in_memory_mib=0))
    (held,) = corpus.heldout_documents(ByteTokenizer())
    assert held.name == "novel.txt (end)"
    first_held = int(held.text.split()[1])
    loader = build_train_loader(
        corpus.config, tokenizer=ByteTokenizer(), sequence_length=64, rows_per_batch=2, seed=0, corpus=corpus
    )
    seen = set()
    while loader.epoch == 0:
        seen |= set(next(loader).document_ids.unique().tolist())
    assert seen == {0}
    assert f"Sentence {first_held} " not in corpus.source[0].text
    assert corpus.index()["held_out_rule"] == "the end of novel.txt, about 0.1 of it"
    assert corpus.num_training_documents == 1


@pytest.mark.parametrize(("written", "meant"), [("1e-2", 0.01), ("0.1", 0.1), ("0", 0.0)])
def test_a_fraction_that_yaml_reads_as_text_is_one(written: str, meant: float) -> None:
    assert DataConfig(heldout=written).heldout == meant
