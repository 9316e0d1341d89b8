"""What the trainer takes from the data besides batches."""

from __future__ import annotations

import pytest

from nsa.launch.start import prepare
from nsa.runs.errors import TrainingError
from nsa.train.trainer import Trainer

DRAWN = {"source": "synthetic", "paths": [], "shuffle_window_tokens": 8192, "max_eval_tokens": 512}


def test_the_known_floor_of_drawn_data_guards_the_run(tiny) -> None:
    trainer = Trainer(tiny(data=DRAWN))
    assert trainer.guard.config.entropy_floor_nats == pytest.approx(1.572, abs=1e-3)
    with pytest.raises(TrainingError, match=r"below the data's floor of 1\.57"):
        trainer.guard.allows(1, 1.5, 1.0)
    assert trainer.guard.allows(1, 1.6, 1.0)
    given = Trainer(tiny(data=DRAWN, guards={"entropy_floor_nats": 0.5}))
    assert given.guard.config.entropy_floor_nats == 0.5
    assert Trainer(tiny()).guard.config.entropy_floor_nats is None


def test_documents_without_end_are_told_as_such(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tiny(data=DRAWN))
    assert "synthetic (copy of 64); documents without end, " in capsys.readouterr().out
