"""What a run trains on and how its held-out documents are chosen.

>>> DataConfig().source
'sotu'
>>> DataConfig(source="text", paths=("corpus/",), text_split="paragraphs").heldout
0.05
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nsa.data.errors import printable
from nsa.data.sources.synthetic import NUM_KEYS
from nsa.section import Section

OneSource = Literal["sotu", "tinyshakespeare", "text", "jsonl", "parquet", "fineweb_edu", "synthetic"]
AnySource = Literal[OneSource, "mix"]
NEEDS_PATHS, MAY_HAVE_PATHS = ("text", "jsonl", "parquet"), ("tinyshakespeare",)
LONGEST_WAIT_S = 1e7


class SourceConfig(Section):
    """What one source needs."""

    paths: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Files, folders or glob patterns, for "text" (*.txt and *.md in folders), "jsonl" (*.jsonl and *.ndjson, else
    *.json) and "parquet" (*.parquet); text and JSON Lines may be compressed: .gz, .bz2, .xz, .zst. A file's documents
    are named after it: its path inside the folder, else its own name, with the line or row (":12")."""

    text_column: Annotated[str, Field(min_length=1)] = "text"
    """The field of the text in JSON Lines, the column of it in Parquet files."""

    text_split: Literal["file", "paragraphs"] = "file"
    """What a document is in a text file: the whole file, or each run of lines between blank lines."""

    hub_repo: str = "HuggingFaceFW/fineweb-edu"
    """Dataset repository of "fineweb_edu" on the Hub; any with the same layout and columns will do."""

    hub_subset: str = "sample-10BT"
    """"sample-10BT", "sample-100BT", "sample-350BT", the name of a crawl such as "CC-MAIN-2024-10", or a folder in the
    repository such as "sample/10BT"."""

    hub_revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    """Commit of the repository, all 40 digits, so that a run names the very files that it read."""

    hub_num_files: Annotated[int, Field(ge=1, le=2**30)] | None = None
    """Read the first so many files of the subset only, in order of their names; unset: all of them."""

    hub_access: Literal["cache", "stream"] = "cache"
    """"cache" downloads whole files before the run, each once; "stream" reads the row groups that are due from the Hub
    during the run and keeps nothing on disk."""

    synthetic_task: Literal["copy", "recall"] = "copy"
    """"copy": random letters, then the same again; "recall": keys with values, then the keys in another order, each to
    be answered by its value."""

    synthetic_length: Annotated[int, Field(ge=2, le=2**17)] = 64
    """Letters to copy, or pairs to recall, in each document of "synthetic"; at most 676 pairs."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        paths = (value,) if isinstance(value, str) else value
        for path in paths if isinstance(paths, list | tuple) else ():
            if isinstance(path, str) and path.encode(errors="replace").decode() != path:
                raise ValueError(
                    f"{printable(path)} is not UTF-8; give its folder, or a pattern with a * in that place"
                )
        return paths


class MixedSource(SourceConfig):
    """One of the sources of a mix."""

    source: OneSource = "sotu"
    """Where its documents come from, as `data.source`."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its part in the rows that are trained on, against the weights of the others."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """What its documents' names begin with; unset: its source."""

    heldout: float | tuple[str, ...] | None = None
    """Its documents kept for evaluation, as `data.heldout`, which holds where this is unset."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _fraction_or_names(cls, value: Any) -> Any:
        return fraction_or_names(value)

    @model_validator(mode="after")
    def _paths_fit_the_source(self) -> MixedSource:
        check_source(self.source, self)
        return self

    @property
    def label(self) -> str:
        """The name by which it is known."""
        return self.name or self.source


class DataConfig(SourceConfig):
    """Source, tokenizer, held-out documents, shuffle and prefetching of one run."""

    source: AnySource = "sotu"
    """Where documents come from. "sotu": the State of the Union messages of the `sotu` package (no files, no network);
    "tinyshakespeare": the 1.1 MB of the char-rnn example, downloaded or at `paths`; "text": UTF-8 text files; "jsonl":
    JSON Lines with a "text" string in each line; "parquet": Parquet files with a "text" column (an "id" string is the
    document's name in both); "fineweb_edu": FineWeb-Edu from the Hugging Face Hub; "synthetic": a learnable task;
    "mix": several of these, listed in `mix`."""

    mix: tuple[MixedSource, ...] = ()
    """The sources of "mix", each with its weight and its own settings (docs/data.md)."""

    cache_folder: Annotated[str, Field(min_length=1)] | None = None
    """Folder for downloads and for what is unpacked; unset: the Hugging Face cache, and ~/.cache/nsa for what is not
    from the Hub."""

    on_error: Literal["stop", "synthetic"] = "stop"
    """What a source that cannot be opened does: end with the error, or train on "synthetic" in its place, which is then
    written into every artifact of the run. Errors during the run always end it."""

    tokenizer: str = "byte"
    """"byte", "bpe1k" (1,024 tokens of English, in the package), "gpt2", a folder with tokenizer files, or a name on
    the Hugging Face Hub."""

    heldout: float | tuple[str, ...] = 0.05
    """Documents kept for evaluation and never trained on: a fraction, chosen by a stable hash of each name, or a list
    of names and glob patterns such as ["1790 George Washington", "19?5 *"]. 0 or [] holds out none."""

    max_eval_tokens: Annotated[int, Field(ge=1, le=2**50)] | None = None
    """Evaluate on about this many tokens, whole rows spread evenly over the held-out documents and the same each time;
    unset: on all of them, or on 2**20 where documents are not in memory."""

    in_memory_mib: Annotated[int, Field(ge=0, le=2**30)] = 256
    """JSON Lines and Parquet files of up to this many MiB in all are read at the start, every line checked, and their
    documents shuffled globally; larger ones are read during the run, chunk by chunk (docs/data.md)."""

    shuffle_window_tokens: Annotated[int, Field(ge=1, le=2**40)] = 2**24
    """Rows are shuffled among this many tokens of shuffled documents, which are in memory at a time."""

    prefetch_batches: Annotated[int, Field(ge=1, le=4096)] = 8
    """Batches that are ready before they are asked for."""

    first_batch_timeout_s: Annotated[float, Field(gt=0, le=LONGEST_WAIT_S)] = 600.0
    """Seconds after which a run whose first batch has not come ends with an error; downloads do not count."""

    stall_timeout_s: Annotated[float, Field(gt=0, le=LONGEST_WAIT_S)] = 300.0
    """Seconds of waiting for a later batch after which the run ends with an error."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _fraction_or_names(cls, value: Any) -> Any:
        return fraction_or_names(value)

    @model_validator(mode="after")
    def _fits_the_source(self) -> DataConfig:
        if self.source != "mix":
            check_source(self.source, self)
        elif self.paths:
            raise ValueError(f"a mix has paths in its sources, but paths are {list(self.paths)}; move them there")
        if (self.source == "mix") != bool(self.mix):
            raise ValueError(
                f'source "{self.source}" with {len(self.mix)} sources in mix; write source: mix, and list some'
            )
        labels = [entry.label for entry in self.mix]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"sources of mix are called {', '.join(twice)} more than once; give each its own name")
        return self

    def of(self, entry: MixedSource) -> DataConfig:
        """The config of one source of the mix, as if it were alone."""
        own = entry.model_dump(exclude={"weight", "name"} | ({"heldout"} if entry.heldout is None else set()))
        return self.model_copy(update={**own, "mix": ()})


def fraction_or_names(value: Any) -> Any:
    """`heldout` as it may be written; YAML takes a number such as 1e-2, without a dot, for a text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f'must be a fraction or a list of names and patterns; write ["{value}"]') from None
    if isinstance(value, float | int) and not 0 <= value < 1:
        raise ValueError("as a fraction must be at least 0 and below 1")
    return value


def check_source(source: str, config: SourceConfig) -> None:
    """Raise `ValueError` unless the settings of a source fit together."""
    if config.paths and source not in NEEDS_PATHS + MAY_HAVE_PATHS:
        raise ValueError(
            f'source "{source}" reads no files, but paths are {list(config.paths)}; set source or drop them'
        )
    if source in NEEDS_PATHS and not config.paths:
        raise ValueError(f'source "{source}" needs paths: files, folders or glob patterns')
    if source in MAY_HAVE_PATHS and len(config.paths) > 1:
        raise ValueError(f'source "{source}" is one file, but paths are {list(config.paths)}')
    if config.synthetic_task == "recall" and config.synthetic_length > NUM_KEYS:
        raise ValueError(f"synthetic_length {config.synthetic_length} exceeds the {NUM_KEYS} keys of two letters")
