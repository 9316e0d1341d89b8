"""Folders of checkpoints are whole or absent, the right ones are kept, and damage is found and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nsa.runs import checkpoints as module
from nsa.runs.checkpoints import complete_checkpoints, damage, newest_checkpoint, remove_parts, step_folders
from nsa.train.checkpoint.load import choose_checkpoint
from saved_runs import write_files


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_the_newest_are_kept_and_latest_points_at_the_last(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        write_files(tmp_path / "checkpoints", step)
    assert names(tmp_path / "checkpoints") == ["latest", "step_000010", "step_000020"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_000020"
    assert newest_checkpoint(tmp_path).name == "step_000020"


def test_milestones_stay_beyond_the_newest(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write_files(tmp_path, step, keep=1, keep_every_steps=30)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000030", "step_000060", "step_000070"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write_files(tmp_path / "checkpoints", step)
    assert newest_checkpoint(tmp_path).name == "step_1000000"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    first = write_files(tmp_path, 5)
    (first / "model.safetensors").write_text("damaged")
    assert damage(write_files(tmp_path, 5)) is None
    assert names(tmp_path) == ["latest", "step_000005"]


@pytest.mark.parametrize("at", ["listing", "rename", "pointer", "removal"])
def test_a_commit_that_is_cut_off_leaves_whole_checkpoints_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write_files(tmp_path, 5, keep=1)
    broken = {
        "listing": (module, "write_json"),
        "rename": (os, "replace"),
        "pointer": (module, "_point"),
        "removal": (module.shutil, "rmtree"),
    }[at]

    def cut_off(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*broken, cut_off)
        with pytest.raises(KeyboardInterrupt):
            write_files(tmp_path, 10, keep=1)
    whole = [path.name for path in complete_checkpoints(tmp_path)]
    assert whole == {"pointer": ["step_000005", "step_000010"], "removal": ["step_000010"]}.get(at, ["step_000005"])
    remove_parts(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".part")]
    write_files(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["latest", "step_000015"]


@pytest.mark.parametrize("kind", ["shorter", "missing", "unlisted", "unreadable"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path, kind: str) -> None:
    write_files(tmp_path / "checkpoints", 5)
    newest = write_files(tmp_path / "checkpoints", 10)
    if kind == "shorter":
        (newest / "model.safetensors").write_text("weigh")
    elif kind == "unreadable":
        (newest / "complete.json").write_text('{"files": {"model')
    else:
        (newest / ("model.safetensors" if kind == "missing" else "complete.json")).unlink()
    assert newest_checkpoint(tmp_path).name == "step_000005"


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_flipped_bit_is_found_named_and_put_aside(tmp_path: Path) -> None:
    write_files(tmp_path, 5, keep=9)
    newest = write_files(tmp_path, 10, keep=9)
    (newest / "model.safetensors").write_text("weighds")
    assert damage(newest, contents=False) is None
    assert f"{newest / 'model.safetensors'} is not what was written" in str(damage(newest))
    chosen, notes = choose_checkpoint(tmp_path)
    assert chosen == tmp_path / "step_000005"
    assert len(notes) == 1
    assert str(newest / "model.safetensors") in notes[0]
    assert "damaged_step_000010" in notes[0]
    assert [path.name for path in step_folders(tmp_path)] == ["step_000005"]
    assert (tmp_path / "damaged_step_000010" / "model.safetensors").is_file()


def test_damage_of_the_same_step_twice_keeps_both_folders(tmp_path: Path) -> None:
    write_files(tmp_path, 5, keep=9)
    for _ in range(2):
        (write_files(tmp_path, 10, keep=9) / "complete.json").unlink()
        choose_checkpoint(tmp_path)
    assert {"damaged_step_000010", "damaged_step_000010_2"} < set(names(tmp_path))


def test_nothing_is_touched_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        (write_files(tmp_path, step, keep=9) / "state" / ".metadata").unlink()
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: .*step_000010.*step_000005"):
        choose_checkpoint(tmp_path)
    assert names(tmp_path) == before
    assert choose_checkpoint(tmp_path / "absent") == (None, [])


def test_a_folder_with_a_model_alone_cannot_be_resumed(tmp_path: Path) -> None:
    checkpoint = write_files(tmp_path, 5)
    (checkpoint / "state" / ".metadata").unlink()
    listing = json.loads((checkpoint / "complete.json").read_text())
    del listing["files"]["state/.metadata"]
    (checkpoint / "complete.json").write_text(json.dumps(listing))
    assert complete_checkpoints(tmp_path) == [checkpoint]
    with pytest.raises(ValueError, match="no state of training"):
        choose_checkpoint(tmp_path)


def test_every_flipped_bit_of_the_listing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 64)  # quicker than a large buffer for each tiny file
    # Names that a bit tells apart.
    parts = {"state/__0_0.distcp": b"a", "state/__1_0.distcp": b"b"}
    checkpoint = write_files(tmp_path, 10, more=parts)
    contents = (checkpoint / "complete.json").read_bytes()
    with (checkpoint / "complete.json").open("r+b", buffering=0) as listing:
        for bit in range(8 * len(contents)):
            os.pwrite(listing.fileno(), bytes([contents[bit // 8] ^ 1 << bit % 8]), bit // 8)
            assert str(checkpoint) in str(damage(checkpoint)), bit
            os.pwrite(listing.fileno(), contents[bit // 8 : bit // 8 + 1], bit // 8)
    assert damage(checkpoint) is None


def test_every_cut_of_the_listing_is_found(tmp_path: Path) -> None:
    checkpoint = write_files(tmp_path, 10)
    path = checkpoint / "complete.json"
    contents = path.read_bytes().rstrip()
    for end in range(len(contents)):
        path.write_bytes(contents[:end])
        assert damage(checkpoint) is not None, end


def test_a_renamed_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    write_files(tmp_path / "checkpoints", 5, keep=9)
    write_files(tmp_path / "checkpoints", 10, keep=9).rename(tmp_path / "checkpoints" / "step_000099")
    assert newest_checkpoint(tmp_path).name == "step_000005"
    chosen, notes = choose_checkpoint(tmp_path / "checkpoints")
    assert chosen == tmp_path / "checkpoints" / "step_000005"
    assert "step_000099 holds step 10; give it back its name step_000010" in notes[0]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "state/../../outside", "link", "deep/link"])
def test_a_listing_that_names_files_outside_is_damage(tmp_path: Path, name: str) -> None:
    checkpoint = write_files(tmp_path / "checkpoints", 5)
    outside = tmp_path / "checkpoints" / "outside"
    outside.write_text("of somebody else")
    if name.endswith("link"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).symlink_to(outside)
    listing = json.loads((checkpoint / "complete.json").read_text())
    listing["files"][name] = vars(module.FileSum.of(outside))
    (checkpoint / "complete.json").write_text(json.dumps(listing))
    for contents in (True, False):
        assert "which lies outside of it" in str(damage(checkpoint, contents=contents))


def test_a_link_is_no_checkpoint(tmp_path: Path) -> None:
    elsewhere = write_files(tmp_path / "elsewhere", 5)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000005").symlink_to(elsewhere)
    assert step_folders(tmp_path / "checkpoints") == []
