"""Pictures of runs: lines that lag nowhere, every state of a run, and names that are only names."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made_up_runs import write_health, write_run
from nsa.runs.curves import device_of, draw_curves, plain, read_curves, running_mean, thinned
from nsa.runs.folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_running_mean_lags_nowhere_behind_a_falling_loss() -> None:
    falling = np.linspace(5.0, 3.0, 400)
    assert running_mean(falling) == pytest.approx(falling.tolist())
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    smooth = np.array(running_mean(falling + noise))
    assert np.abs(smooth - falling).max() < 0.12
    assert abs(smooth[-20:].mean() - falling[-20:].mean()) < 0.05
    assert np.std(smooth[50:350] - falling[50:350]) < 0.04


def test_the_running_mean_passes_over_what_is_not_finite() -> None:
    assert running_mean([]) == []
    assert running_mean([3.0]) == [3.0]
    assert running_mean([1.0, math.nan, 2.0]) == pytest.approx([1.0, 1.5, 2.0])
    assert math.isnan(running_mean([math.nan])[0])


def test_a_long_curve_is_thinned_to_its_end() -> None:
    x = np.arange(1e6)
    some_x, some_y = thinned(x, 2 * x)
    assert len(some_x) == len(some_y) == 4000
    assert (some_x[0], some_x[-1], some_y[-1]) == (0, 999_999, 1_999_998)


@pytest.mark.parametrize("losses", [[5.0, 2.0, 1.5], [5.0, 2.0], [5.0], [5.0, math.nan, math.inf], [2.0] * 9])
def test_curves_are_drawn_of_a_run_at_any_point(tmp_path: Path, losses: list[float]) -> None:
    folder = RunFolder(write_run(tmp_path / "run", losses, state="running"))
    draw_curves(folder, folder.curves_png)
    assert folder.curves_png.read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("run/.*part"))


def test_gates_are_drawn_below_the_losses_where_they_were_measured(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [5.0, 2.0, 1.5]))
    draw_curves(folder, folder.curves_png)
    without = png_size(folder.curves_png)
    write_health(folder.path, [{"step": step, "layer": layer} for step in (1, 2) for layer in (0, 3)])
    draw_curves(folder, folder.curves_png)
    assert png_size(folder.curves_png)[1] > without[1]
    assert without[0] >= 1500


def test_a_picture_takes_the_place_of_a_link_and_leaves_what_it_points_to(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [5.0, 2.0]))
    (tmp_path / "precious").write_text("mine")
    folder.curves_png.symlink_to(tmp_path / "precious")
    draw_curves(folder, folder.curves_png)
    assert (tmp_path / "precious").read_text() == "mine"
    assert folder.curves_png.read_bytes().startswith(PNG)


def test_evaluations_lie_at_the_tokens_of_their_step(tmp_path: Path) -> None:
    curves = read_curves(RunFolder(write_run(tmp_path / "run", [5.0, 2.0, 1.5])))
    assert curves.val_tokens.tolist() == [0, 100, 200]
    assert (curves.last_token, curves.last_bits_per_byte) == (200, pytest.approx(1.5 / math.log(2)))


@pytest.mark.parametrize("name", ["a$b$c", r"$\frac", "_hidden", "[bold]", "\x1b[31mred", "x" * 500])
def test_a_name_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [5.0, 2.0]))
    shown = plain(name)
    assert "\x1b" not in shown
    assert not shown.startswith("_")
    assert len(shown) < 60
    (folder.env_json).write_text('{"device_name": "a $ device", "device": 3}')
    assert device_of(folder) == r"a \$ device"
    draw_curves(folder, folder.curves_png)
    curves = replace(read_curves(folder), name=shown)
    assert curves.name == shown


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return struct.unpack(">II", path.read_bytes()[16:24])
