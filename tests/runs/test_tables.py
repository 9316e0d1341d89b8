"""The tables of a run: what is written is what is read, also after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, CsvWriter, read_csv

ROW = {
    "step": 1,
    "tokens": 4096,
    "loss": 0.1 + 0.2,
    "lr": 3e-4,
    "grad_norm": float("inf"),
    "tokens_per_s": 1e7 / 3,
    "mfu": None,
    "step_s": 0.5,
    "fetch_s": 1e-5,
}


def test_the_columns_are_those_that_the_design_promises() -> None:
    assert ",".join(TRAINING_COLUMNS) == "step,tokens,loss,lr,grad_norm,tokens_per_s,mfu,step_s,fetch_s"
    assert ",".join(VALIDATION_COLUMNS) == "step,val_loss,val_ppl,val_bits_per_byte"
    gates = "entropy_mean_nats", "max_mean", "share_cmp", "share_slc", "share_win", "collapse_share"
    selection = "mean_selected_tokens", "max_selected_tokens", "share_at_maximum", "mean_coverage"
    selection += "blocks_chosen_share", "mean_distance_blocks"
    assert ("step", "layer", *(f"gate_{name}" for name in gates), *selection) == HEALTH_COLUMNS


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "training.csv"
    with CsvWriter(path, TRAINING_COLUMNS) as writer:
        writer.write(**ROW)
        writer.write(**{**ROW, "step": 2, "mfu": 0.25})
    assert read_csv(path, TRAINING_COLUMNS) == [ROW, {**ROW, "step": 2, "mfu": 0.25}]
    assert [type(value) for value in read_csv(path, TRAINING_COLUMNS)[0].values()][:3] == [int, int, float]


def test_each_row_is_on_disk_at_once_and_half_a_row_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    with CsvWriter(path, VALIDATION_COLUMNS) as writer:
        writer.write(step=0, val_loss=5.5, val_ppl=250.0, val_bits_per_byte=8.0)
        assert len(read_csv(path, VALIDATION_COLUMNS)) == 1
        with path.open("a") as other:
            other.write("100,2.")
        assert [row["step"] for row in read_csv(path, VALIDATION_COLUMNS)] == [0]


def test_a_row_needs_every_column_and_no_other(tmp_path: Path) -> None:
    with CsvWriter(tmp_path / "val.csv", VALIDATION_COLUMNS) as writer:
        with pytest.raises(ValueError, match="exactly the columns step, val_loss"):
            writer.write(step=1, val_loss=2.0)
        with pytest.raises(ValueError, match="exactly the columns"):
            writer.write(step=1, val_loss=2.0, val_ppl=1.0, val_bits_per_byte=1.0, loss=1.0)


def test_a_file_that_is_no_such_table_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    with pytest.raises(ValueError, match=r"val\.csv is missing"):
        read_csv(path, VALIDATION_COLUMNS)
    path.write_text("step,loss\n")
    with pytest.raises(
        ValueError, match="begins with 'step,loss', which lacks val_loss; this table begins with step,val"
    ):
        read_csv(path, VALIDATION_COLUMNS)
    header = ",".join(VALIDATION_COLUMNS) + "\n"
    path.write_text(header + "1,2.0,3.0,4.0\n1,two,3.0,4.0\n")
    with pytest.raises(ValueError, match=r"line 3: val_loss is 'two'"):
        read_csv(path, VALIDATION_COLUMNS)
    path.write_text(header + "1,2.0\n")
    with pytest.raises(ValueError, match=r"line 2 has 2 cells, not 4"):
        read_csv(path, VALIDATION_COLUMNS)


def test_a_table_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "training.csv"
    path.write_text("step,new,tokens,loss\n1,9,100,2.5\n")
    row = dict.fromkeys(TRAINING_COLUMNS) | {"step": 1, "tokens": 100, "loss": 2.5}
    assert read_csv(path, TRAINING_COLUMNS) == [row]


def test_reading_stops_where_a_line_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    path.write_text(",".join(VALIDATION_COLUMNS) + "\n1,2.0,3.0,4.0\n" + "9" * 30_000 + "\n2,2.0,3.0,4.0\n")
    assert [row["step"] for row in read_csv(path, VALIDATION_COLUMNS)] == [1]


def test_a_table_goes_on_after_a_step_and_what_came_later_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "training.csv"
    with CsvWriter(path, TRAINING_COLUMNS) as writer:
        for step in (1, 2, 3, 4):
            writer.write(**{**ROW, "step": step})
    before = path.read_text().splitlines()
    with path.open("a") as other:
        other.write("5,20")
    with CsvWriter(path, TRAINING_COLUMNS, resume_step=2) as writer:
        writer.write(**{**ROW, "step": 3, "loss": 1.5})
    assert path.read_text().splitlines()[:3] == before[:3]
    assert [(row["step"], row["loss"]) for row in read_csv(path, TRAINING_COLUMNS)] == [
        (1, 0.30000000000000004),
        (2, 0.30000000000000004),
        (3, 1.5),
    ]


def test_a_table_that_is_not_there_yet_begins_and_a_damaged_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    with CsvWriter(path, VALIDATION_COLUMNS, resume_step=7) as writer:
        writer.write(step=8, val_loss=1.0, val_ppl=2.0, val_bits_per_byte=3.0)
    assert [row["step"] for row in read_csv(path, VALIDATION_COLUMNS)] == [8]
    path.write_text("step,loss\n8,1.0\n")
    with pytest.raises(ValueError, match="must begin with the header"):
        CsvWriter(path, VALIDATION_COLUMNS, resume_step=7)
    assert path.read_text() == "step,loss\n8,1.0\n"
