"""The data section of a run's config refuses what cannot be meant."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nsa.config.load import override_config
from nsa.config.run import RunConfig
from nsa.data import DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heldout": "1790 *"}, r'write \["1790 \*"\]'),
        ({"heldout": 1.0}, "at least 0 and below 1"),
        ({"heldout": -0.1}, "at least 0 and below 1"),
        ({"source": "text"}, "needs paths"),
        ({"paths": ("a.txt",)}, "reads no files"),
        (
            {"source": "web"},
            "'sotu', 'tinyshakespeare', 'text', 'jsonl', .* 'synthetic' or 'mix'",
        ),
        ({"max_eval_tokens": 0}, "greater than or equal to 1"),
        ({"held_out": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_explained(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)


@pytest.mark.parametrize(
    ("arguments", "heldout"),
    [
        ([], 0.05),
        (["--data.heldout", "0.2"], 0.2),
        (["--data.heldout", "0"], 0.0),
        (["--data.heldout", "1790 *", "b"], ("1790 *", "b")),
    ],
)
def test_held_out_is_a_fraction_or_names_on_the_command_line(arguments: list[str], heldout: object) -> None:
    assert override_config(RunConfig(), arguments).data.heldout == heldout


def test_values_survive_json() -> None:
    config = DataConfig(source="jsonl", paths=("a", "b"), heldout=("x", "y*"), max_eval_tokens=7)
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
