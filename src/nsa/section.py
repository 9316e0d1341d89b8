"""The base of every section of settings: frozen, unknown keys refused, and no value taken for another kind.

>>> class Fan(Section):
...     speed: float = 1.0
>>> Fan(speed=2).speed
2.0
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Keys with checked values: `true` is no number, 1 no boolean, "3" no number, and numbers are finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        """YAML and JSON have lists only. No text holds a NUL, which no file name can have."""
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, str) and "\0" in item for item in values):
            raise ValueError("must hold no NUL character")
        return tuple(value) if isinstance(value, list) else value
