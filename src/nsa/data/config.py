"""What a run trains on and how its held-out documents are chosen.

>>> DataConfig().source
'sotu'
>>> DataConfig(source="text", paths=("corpus/",), text_split="paragraphs").heldout
0.05
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nsa.data.synthetic import NUM_KEYS

SourceName = Literal["sotu", "tinyshakespeare", "text", "jsonl", "parquet", "fineweb_edu", "synthetic"]
NEEDS_PATHS, MAY_HAVE_PATHS = ("text", "jsonl", "parquet"), ("tinyshakespeare",)


class DataConfig(BaseModel):
    """Source, tokenizer, held-out documents, shuffle and prefetching of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: SourceName = "sotu"
    """Where documents come from. "sotu": the State of the Union messages of the `sotu` package (no files, no network);
    "tinyshakespeare": the 1.1 MB of the char-rnn example, downloaded or at `paths`; "text": UTF-8 text files; "jsonl":
    JSON Lines with a "text" string in each line; "parquet": Parquet files with a "text" column (an "id" string is the
    document's name in both); "fineweb_edu": FineWeb-Edu from the Hugging Face Hub; "synthetic": a learnable task."""

    paths: tuple[str, ...] = ()
    """Files, folders (all *.txt, *.jsonl or *.parquet inside) or glob patterns, for "text", "jsonl" and "parquet". A
    file's documents are named after it: its path inside the folder, else its own name, with the line or row (":12")."""

    text_split: Literal["file", "paragraphs"] = "file"
    """What a document is in a text file: the whole file, or each run of lines between blank lines."""

    hub_repo: str = "HuggingFaceFW/fineweb-edu"
    """Dataset repository of "fineweb_edu" on the Hub; any with the same layout and columns will do."""

    hub_subset: str = "sample-10BT"
    """"sample-10BT", "sample-100BT", "sample-350BT", the name of a crawl such as "CC-MAIN-2024-10", or a folder in the
    repository such as "sample/10BT"."""

    hub_revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    """Commit of the repository, all 40 digits, so that a run names the very files that it read."""

    hub_num_files: Annotated[int, Field(ge=1)] | None = None
    """Read the first so many files of the subset only, in order of their names; unset: all of them."""

    hub_access: Literal["cache", "stream"] = "cache"
    """"cache" downloads whole files before the run, each once; "stream" reads the row groups that are due from the Hub
    during the run and keeps nothing on disk."""

    cache_folder: str | None = None
    """Folder for downloads; unset: the Hugging Face cache, and ~/.cache/nsa for what is not from the Hub."""

    synthetic_task: Literal["copy", "recall"] = "copy"
    """"copy": random letters, then the same again; "recall": keys with values, then the keys in another order, each to
    be answered by its value."""

    synthetic_length: Annotated[int, Field(ge=2)] = 64
    """Letters to copy, or pairs to recall, in each document of "synthetic"; at most 676 pairs."""

    on_error: Literal["stop", "synthetic"] = "stop"
    """What a source that cannot be opened does: end with the error, or train on "synthetic" in its place, which is then
    written into every artifact of the run. Errors during the run always end it."""

    tokenizer: str = "byte"
    """"byte", "bpe1k" (1,024 tokens of English, in the package), "gpt2", a folder with tokenizer files, or a name on
    the Hugging Face Hub."""

    heldout: float | tuple[str, ...] = 0.05
    """Documents kept for evaluation and never trained on: a fraction, chosen by a stable hash of each name, or a list
    of names and glob patterns such as ["1790 George Washington", "19?5 *"]. 0 or [] holds out none."""

    max_eval_tokens: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on about this many tokens, whole rows spread evenly over the held-out documents and the same each time;
    unset: on all of them, or on 2**20 where documents are not in memory."""

    in_memory_mib: Annotated[int, Field(ge=0)] = 256
    """JSON Lines and Parquet files of up to this many MiB in all are read at the start, every line checked, and their
    documents shuffled globally; larger ones are read during the run, block by block (docs/data.md)."""

    shuffle_window_tokens: Annotated[int, Field(ge=1)] = 2**24
    """Rows are shuffled among this many tokens of shuffled documents, which are in memory at a time."""

    prefetch_batches: Annotated[int, Field(ge=1)] = 8
    """Batches that are ready before they are asked for."""

    first_batch_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a run whose first batch has not come ends with an error; downloads do not count."""

    stall_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of waiting for a later batch after which the run ends with an error."""

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
        if self.paths and self.source not in NEEDS_PATHS + MAY_HAVE_PATHS:
            raise ValueError(
                f'source "{self.source}" reads no files, but paths are {list(self.paths)}; set source or drop them'
            )
        if self.source in NEEDS_PATHS and not self.paths:
            raise ValueError(f'source "{self.source}" needs paths: files, folders or glob patterns')
        if self.source in MAY_HAVE_PATHS and len(self.paths) > 1:
            raise ValueError(f'source "{self.source}" is one file, but paths are {list(self.paths)}')
        if self.synthetic_task == "recall" and self.synthetic_length > NUM_KEYS:
            raise ValueError(f"synthetic_length {self.synthetic_length} exceeds the {NUM_KEYS} keys of two letters")
        return self
