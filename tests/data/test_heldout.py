"""The choice of held-out documents is by name, stable, and never empty by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa.data import ByteTokenizer, DataConfig, DataError, Documents, build_train_loader, open_corpus
from nsa.data.heldout import split_documents, with_end_apart

NAMES = ["1790 A", "1790 B", "1791 A", "a[1].txt", "a1.txt"]


def documents(names: list[str]) -> Documents:
    return Documents(names, ["text"] * len(names))


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
    train, chosen = split_documents(documents(NAMES), heldout)
    assert chosen == expected
    assert sorted(train + chosen) == list(range(len(NAMES)))


def test_a_fraction_depends_on_the_names_alone() -> None:
    names = [f"document {index}" for index in range(2000)]
    chosen = {names[index] for index in split_documents(documents(names), 0.1)[1]}
    assert 150 < len(chosen) < 250
    shuffled = [*names[1000:1900], "other", *names[:1000]]
    again = {shuffled[index] for index in split_documents(documents(shuffled), 0.1)[1]}
    assert again - {"other"} == {name for name in chosen if name in shuffled}
    assert chosen < {names[index] for index in split_documents(documents(names), 0.2)[1]}
    assert split_documents(documents(["1829 Andrew Jackson", "1830 Andrew Jackson"]), 0.05) == ([1], [0])


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
        split_documents(documents(NAMES), heldout)


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
    assert [parts.name(0), parts.name(1)] == ["novel.txt", "novel.txt (end)"]
    assert parts.text(0) + parts.text(1) == whole.text(0)
    assert parts.text(0).endswith(ends)
    assert len(parts.text(1)) == pytest.approx(fraction * len(whole.text(0)), rel=0.5)


def test_the_cut_lies_between_paragraphs_where_there_is_one_near() -> None:
    text = "a line\n" * 40 + "\n" + "a line\n" * 5
    assert with_end_apart(Documents(["a"], [text]), 0.1).text(1) == "a line\n" * 5
    far = "a line\n" * 10 + "\n" + "a line\n" * 80
    assert with_end_apart(Documents(["a"], [far]), 0.1).text(1) == "a line\n" * 9


def test_a_text_without_two_parts_is_refused() -> None:
    for text in ("", "word", "word" + " " * 50):
        with pytest.raises(DataError, match=r"novel is too short to hold out 0\.1"):
            with_end_apart(Documents(["novel"], [text]), 0.1)


def test_a_corpus_of_one_text_trains_on_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("".join(f"Sentence {n} of a story.\n" for n in range(500)), encoding="utf-8")
    corpus = open_corpus(DataConfig(source="text", paths=(str(path),), heldout=0.1))
    source, held = corpus.heldout_documents(ByteTokenizer())
    assert [source.name(index) for index in held] == ["novel.txt (end)"]
    first_held = int(source.text(1).split()[1])
    loader = build_train_loader(
        corpus.config, tokenizer=ByteTokenizer(), sequence_length=64, rows_per_batch=2, seed=0, corpus=corpus
    )
    seen = set()
    while loader.epoch == 0:
        seen |= set(next(loader).document_ids.unique().tolist())
    assert seen == {0}
    assert f"Sentence {first_held} " not in source.text(0)
    assert corpus.index()["held_out_rule"] == "the end of novel.txt, about 0.1 of it"
    assert corpus.num_training_documents == 1


@pytest.mark.parametrize(("written", "meant"), [("1e-2", 0.01), ("0.1", 0.1), ("0", 0.0)])
def test_a_fraction_that_yaml_reads_as_text_is_one(written: str, meant: float) -> None:
    assert DataConfig(heldout=written).heldout == meant
