"""`nsa inspect`: the lines, their order, and what it refuses."""

import json

import pytest
import torch

from nsa.cli import main
from nsa.data import ByteTokenizer
from nsa.inspect.selection import record_selection
from tiny_models import tiny_model

PROMPT = "the long road " * 8


@pytest.fixture(scope="module")
def model():
    return tiny_model("nsa", "full_attention", "nsa", vocab_size=259).float()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    ByteTokenizer().save(path)
    return path


def lines(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_layer_group_and_query_has_its_line_with_its_blocks(folder, model, capsys):
    found = lines(capsys, folder, "--prompt", PROMPT, "--ranges", "--position", "all")
    ids = torch.tensor([ByteTokenizer().encode(PROMPT)])
    with torch.no_grad(), record_selection(model) as selections:
        model(ids)
    places = [(layer, position, group) for layer in (0, 2) for position in range(ids.shape[1]) for group in range(2)]
    assert [(x["layer"], x["position"], x["group"]) for x in found[:-3]] == places
    for line, (layer, position, group) in zip(found[:-3], places, strict=True):
        assert line["blocks"] == [j for j in selections[layer][0, position, group].tolist() if j >= 0]
    assert [x["summary"] for x in found[-3:]] == ["layer 0", "layer 2", "all"]
    assert found[-1]["num_rows"] == len(places)


def test_layer_and_position_narrow_the_lines(folder, capsys):
    found = lines(capsys, folder, "--prompt", PROMPT, "--ranges", "--layer", 2, "--position", 70)
    assert [(x["layer"], x["position"], x["group"]) for x in found[:-2]] == [(2, 70, 0), (2, 70, 1)]
    found = lines(capsys, folder, "--prompt", PROMPT, "--ranges")
    assert {x["position"] for x in found[:-3]} == {len(PROMPT) - 1}


def test_without_ranges_there_are_statistics_only(folder, capsys):
    assert [x["summary"] for x in lines(capsys, folder, "--prompt", PROMPT)] == ["layer 0", "layer 2", "all"]


def test_lines_can_go_to_a_file(folder, tmp_path, capsys):
    printed = lines(capsys, folder, "--prompt", PROMPT, "--ranges")
    assert lines(capsys, folder, "--prompt", PROMPT, "--ranges", "--out", tmp_path / "out.jsonl") == []
    assert [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()] == printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "1"], "--layer 1 is no NSA layer of the model; choose one of 0, 2"),
        (["--ranges", "--position", "112"], '--position must be "last", "all" or 0..111, not \'112\''),
        (["--out", "/nowhere/out.jsonl"], "/nowhere/out.jsonl"),
    ],
)
def test_what_does_not_exist_is_refused(folder, capsys, options, message):
    assert main(["inspect", str(folder), "--prompt", PROMPT, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_dense_model_is_refused(tmp_path, capsys):
    tiny_model("full_attention", vocab_size=259).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert main(["inspect", str(tmp_path), "--prompt", PROMPT]) == 2
    assert "no NSA layer" in capsys.readouterr().err


def test_a_prompt_file_gives_what_the_prompt_gives(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert lines(capsys, folder, "--prompt_file", tmp_path / "prompt.txt") == lines(capsys, folder, "--prompt", PROMPT)
