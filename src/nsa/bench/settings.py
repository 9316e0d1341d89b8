"""What each benchmark of `nsa bench` can be told; apart from the measuring, so that a slip is told before torch is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from nsa.geometry import BlockGeometry


@dataclass(frozen=True)
class PrefillBench:
    """What to measure: lengths and sizes, precision, device, and how often."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Tokens of a sequence."""
    batch: int = 1
    """Sequences at once."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads of NSA; dense attention has `num_heads`."""
    head_dim: int = 64
    """Size of a query and key head."""
    value_head_dim: int = 64
    """Size of a value head."""
    geometry: tuple[int, int, int, int, int, int, int] = BlockGeometry().as_tuple()  # pyright: ignore[reportAssignmentType]
    """The fields of BlockGeometry in order: l, d, l', n, initial and local blocks, w."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of all tensors."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    backend: str = "auto"
    """Implementation of the NSA operator."""
    pool: bool = True
    """Count mean pooling in NSA's times; without, compressed keys and values are inputs."""
    alike: int = 1
    """Average queries and keys over this many tokens up to each; 1 leaves them random."""
    dense: bool = True
    """Measure dense attention too."""
    dense_backend: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Implementation of dense attention; "auto" leaves it to PyTorch."""
    stages: bool = True
    """Measure each stage alone too."""
    memory: bool = True
    """Measure peak memory, in a process for each length and kind of attention."""
    warmup: int = 1
    """Rounds before the clock counts."""
    repeats: int = 5
    """Rounds that count."""


@dataclass(frozen=True)
class DecodeBench:
    """What to measure: the sizes of the model, the contexts, and how often."""

    contexts: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens in the cache before the measured ones, ascending."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 256
    """Width of the model; its SwiGLU is 4 times as wide."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key/value heads."""
    batch: int = 1
    """Rows decoded together."""
    prefill_chunk: int = 2048
    """Tokens of one prefill pass."""
    warmup: int = 5
    """Tokens decoded before the clock runs."""
    repeats: int = 50
    """Tokens that are timed."""
    dense: bool = True
    """Measure the dense model too; its prefill takes most of the time at long contexts."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""


@dataclass(frozen=True)
class TelemetryBench:
    """What to measure: a run's config, and how often."""

    config: tyro.conf.Positional[str] = "train_showcase"
    """A YAML file, or the name of a config of the package; every --section.key of `nsa train` may follow."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Options such as ("--train.compile", "false") on top of the config."""
    warmup: int = 3
    """Rounds before the clock counts."""
    repeats: int = 20
    """Rounds that count."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""


@dataclass(frozen=True)
class TrainBench:
    """What to measure: a run's config, with other lengths and layers, and how often."""

    config: tyro.conf.Positional[str | None] = None
    """A YAML file, or the name of a config of the package; a one-layer toy unless given. Every --section.key of `nsa train`
    may follow."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Options such as ("--train.compile", "false") on top of the config."""
    lengths: tuple[int, ...] = ()
    """Tokens in a row; the config's unless given."""
    layer_types: tuple[str, ...] = ("nsa", "full_attention")
    """Attention of all layers, one model for each."""
    documents: Literal["rows", "packed"] = "rows"
    """Attend to each row as one document, or keep the documents in it apart."""
    warmup: int = 5
    """Steps of each model before the clock counts."""
    steps: int = 50
    """Steps of each model that count."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    profile: bool = False
    """Print the kernels of one more step of each model by their time."""
