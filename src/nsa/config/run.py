"""The training configuration: what every key means, its unit, default and range.

A run is described by one YAML file with these sections, and overrides on the command line:

    nsa train configs/train_showcase.yaml --optim.lr 1e-3 --run.name trial

Every model is frozen and refuses unknown keys. `nsa.config.load` reads files and overrides. Nothing here is read
from the environment.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from nsa.config.device_name import check_device_name
from nsa.config.findings import check_allowed
from nsa.config.yaml_file import parse_yaml
from nsa.data.config import DataConfig
from nsa.geometry import BlockGeometry
from nsa.model_options import (
    Backend,
    Compression,
    CompressRope,
    GateKind,
    LayerType,
    check_known_rope,
    head_sizes,
)
from nsa.section import Section

# The upper bounds are far beyond any run; a number above them is a slip that would hang or overflow.
Size = Annotated[int, Field(ge=1, le=2**20)]
Tokens = Annotated[int, Field(ge=1, le=2**40)]
BlockTokens = Annotated[int, Field(le=2**31)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
StepsOrNever = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]
Decay = Annotated[float, Field(ge=0, lt=1)]

# Keys of somebody else's; the rest of it is what `nsa train --help` shows.
Mapping = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{KEY: VALUE}",
        instance_from_str=lambda words: parse_yaml(words[0], source="an option"),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(value)],
    ),
]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
MAX_PARAMETERS = 10**12


class RunSection(Section):
    """Where the run lives, and on what it runs."""

    name: str = "run"
    """Name of the run folder: letters, digits, dot, dash and underscore."""
    folder: Annotated[str, Field(min_length=1)] = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the order of the data and everything else that is drawn."""
    device: str = "auto"
    """"auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N"."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads of CPU work; torch's choice, the cores, unless given. Another number may change a result's last bits."""
    deterministic: bool = True
    """Use deterministic algorithms only, on the CPU; two runs with one config then agree bit for bit."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                "must be at most 200 letters, digits, dots, dashes and underscores, a letter or digit first"
            )
        return name

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, name: str) -> str:
        check_device_name(name)
        return name


class ModelSection(Section):
    """The decoder; the keys are those of `NSAConfig`. The vocabulary comes from the tokenizer."""

    hidden_size: Size = 128
    """Width of the residual stream."""
    intermediate_size: Size = 344
    """Width of the SwiGLU layer."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 4
    """Decoder layers."""
    num_attention_heads: Size = 4
    """Query heads."""
    num_key_value_heads: Size = 2
    """Key/value heads; divides the query heads."""
    head_dim: Size | None = None
    """Size of a query or key head; hidden_size / num_attention_heads unless given."""
    value_head_dim: Size | None = None
    """Size of a value head; head_dim unless given."""
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1)] = ("nsa",)
    """Attention of each layer; a single entry holds for every layer."""
    max_position_embeddings: Tokens | None = None
    """Longest context the model is meant for; train.sequence_length unless given."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rope_parameters: Mapping = Field(default={})
    """Its scaling, as transformers defines it: {rope_type: yarn, factor: 4.0}; "linear", "ntk", "yarn" and "llama3" are
    known (docs/training.md); {} for none."""
    attention_bias: bool = False
    """Whether query, key and value projections have a bias."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output layer."""
    compress_block_size: BlockTokens = 32
    """l: tokens summarised by one compressed token."""
    compress_stride: BlockTokens = 16
    """d: tokens between compressed blocks; divides both block sizes."""
    select_block_size: BlockTokens = 64
    """l': tokens in one selection block."""
    num_selected_blocks: BlockTokens = 16
    """n: selected blocks for each query, forced ones included."""
    num_init_blocks: BlockTokens = 1
    """Forced blocks at the start of the document."""
    num_local_blocks: BlockTokens = 2
    """Forced blocks up to the query's own."""
    window_size: BlockTokens = 512
    """w: tokens in the sliding window, the query's own included."""
    compression: Compression = "mean"
    """How a block becomes one compressed token."""
    compress_rope: CompressRope = "before"
    """Rotate keys before or after they are compressed."""
    shared_kv: bool = False
    """Share one K and V among the three branches."""
    gate: GateKind = "softmax"
    """How the branches are weighed."""
    gate_temperature: PositiveFloat = 1.0
    """Divides the gate's logits."""
    attention_backend: Backend = "auto"
    """Implementation of the NSA operator."""

    @field_validator("rope_parameters")
    @classmethod
    def _is_known(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        check_known_rope(parameters)
        return parameters

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        _ = self.geometry, self.head_sizes
        if len(self.layer_types) not in (1, self.num_hidden_layers):
            raise ValueError(
                f"layer_types needs 1 entry or one for each of the {self.num_hidden_layers} layers, "
                f"not {len(self.layer_types)}"
            )
        if (parameters := self._num_inner_parameters) > MAX_PARAMETERS:
            raise ValueError(
                f"the sizes make a model of {parameters:.1e} parameters, more than {MAX_PARAMETERS:.0e}; lower "
                f"hidden_size, intermediate_size, the heads or num_hidden_layers"
            )
        return self

    @property
    def _num_inner_parameters(self) -> int:
        """Weights of the linear layers, nearly all of a large model."""
        key, value = self.head_sizes
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        attention = self.hidden_size * (heads + groups) * (key + value)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Sizes of a query or key head and of a value head, where they are not given too."""
        names = ("num_attention_heads", "num_key_value_heads")
        counts = (self.num_attention_heads, self.num_key_value_heads)
        return head_sizes(self.hidden_size, *counts, self.head_dim, self.value_head_dim, names=names)

    @property
    def geometry(self) -> BlockGeometry:
        """The block sizes and counts as one value."""
        return BlockGeometry(**{name: getattr(self, name) for name in BlockGeometry.__dataclass_fields__})


class OptimSection(Section):
    """AdamW, with a linear warm-up and a cosine down to a floor, in optimizer steps."""

    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step as a share of the peak."""
    warmup_steps: StepsOrNever = 20
    """Optimizer steps over which the rate rises linearly to the peak."""
    beta1: Decay = 0.9
    """Decay of the gradient's running mean."""
    beta2: Decay = 0.95
    """Decay of the squared gradient's running mean."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of the linear layers' weights; norms, biases, embeddings and gates have none."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


class TrainSection(Section):
    """How long, in which pieces and in which precision."""

    steps: Steps = 400
    """Optimizer steps; with max_minutes, the most that are done."""
    max_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Minutes that the whole run may take on this machine. A few steps are timed first; where all would take longer,
    there are fewer, and what counts in steps (warm-up, evaluations, logs, checkpoints) keeps its share. What came out
    stands in the run's config.yaml, without max_minutes, so that it gives the same run again."""
    fitted: str | None = None
    """How train.steps came from max_minutes; written by the run, for people."""
    sequence_length: Annotated[int, Field(ge=2, le=2**27)] = 512
    """T: tokens in a row."""
    batch_tokens: Tokens = 8192
    """Tokens of one optimizer step over all processes; a multiple of micro_batch_rows * sequence_length."""
    micro_batch_rows: Size = 16
    """Rows of one forward and backward pass of each process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" computes in bf16; weights and optimizer stay in fp32."""
    parallel: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """How the processes that torchrun starts share the work; "auto" is "ddp". A single process shares nothing."""
    collective_timeout_s: Seconds = 600.0
    """Seconds that a rank waits for the others before the run fails."""
    compile: bool = False
    """Compile the decoder layers and the loss with torch.compile; worth its minute of compiling on a GPU."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward recomputes to save memory: "selective" keeps the attention's results, "full" keeps only what each
    layer gets; neither chooses the blocks again."""
    log_every_steps: Steps = 10
    """Optimizer steps between log lines; `training.csv` has every step."""
    checkpoint_every_steps: StepsOrNever = 500
    """Optimizer steps between checkpoints; 0 writes the last one only."""
    keep_checkpoints: Steps = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: StepsOrNever = 0
    """Checkpoints of multiples of this step are kept too; 0 for none."""
    early_stop_evals: StepsOrNever = 0
    """End after this many evaluations in a row without a better held-out loss; 0 never does."""


class GuardSection(Section):
    """What must not happen in a step; judged before the weights change."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient norm does."""
    spike_factor: Annotated[float | None, Field(gt=1)] = None
    """A loss beyond this multiple of the median of the last 50 is a spike; its step is skipped."""
    max_skipped_steps: Steps = 5
    """More skipped steps in a row than this end the run as failed."""
    entropy_floor_nats: NonNegativeFloat | None = None
    """Least loss per token that the data allows; a lower one means a leak and ends the run as failed."""


class EvalSection(Section):
    """Loss on held-out documents: before the first step, every so often, and after the last. `data` says which."""

    every_steps: Steps = 100
    """Optimizer steps between evaluations."""
    rows: Size = 16
    """Rows of one evaluation batch."""


class SampleSection(Section):
    """Text that the model continues before and after training."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ("The state of the union is ",)
    """Beginnings to continue; none may be empty."""
    max_new_tokens: Annotated[int, Field(ge=0, le=2**20)] = 200
    """Tokens to generate for each prompt; 0 writes no samples."""
    temperature: PositiveFloat = 0.8
    """Divides the logits."""
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 50
    """Draw among this many likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw among the likeliest tokens that hold this probability."""


class ObserveSection(Section):
    """What a run reports about itself beside its tables."""

    heartbeat_s: Annotated[float, Field(ge=0.01, le=3600)] = 5.0
    """Seconds between the lines of a rank's heartbeat."""
    health_every_steps: StepsOrNever = 100
    """Optimizer steps between measurements of gates and selection: a forward pass over one held-out row; 0 for none."""
    health_layers: tuple[StepsOrNever, ...] | None = None
    """Decoder layers to measure, from 0; all NSA layers unless given."""
    profile_steps: tuple[Steps, Steps] | None = None
    """First and last step of a torch.profiler trace in `profile/`; none unless given."""
    memory_snapshot_steps: tuple[Steps, Steps] | None = None
    """First and last step of a history of CUDA memory in `profile/`; none unless given."""

    @field_validator("profile_steps", "memory_snapshot_steps")
    @classmethod
    def _ordered(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        if window is not None and window[0] > window[1]:
            raise ValueError(f"first step {window[0]} is after last step {window[1]}")
        return window


class PreflightSection(Section):
    """What the checks before the first step may let pass."""

    allow: tuple[str, ...] = ()
    """Names of findings that do not refuse the run, such as "no-checkpoints"; recorded in the run folder."""

    @field_validator("allow")
    @classmethod
    def _known(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        check_allowed(codes)
        return codes


class RunConfig(Section):
    """Everything that decides a run; stored beside it as `config.yaml`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    guards: GuardSection = GuardSection()
    eval: EvalSection = EvalSection()
    sample: SampleSection = SampleSection()
    observe: ObserveSection = ObserveSection()
    preflight: PreflightSection = PreflightSection()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        self.micro_batches_of_each(1)
        return self

    def micro_batches_of_each(self, world_size: int) -> int:
        """Forward and backward passes of one optimizer step in each of `world_size` processes.

        Raises:
            ValueError: the tokens of a step cannot be shared evenly.
        """
        train = self.train
        piece = world_size * train.micro_batch_rows * train.sequence_length
        if train.batch_tokens % piece:
            processes = f"{world_size} processes * " if world_size > 1 else ""
            raise ValueError(
                f"train.batch_tokens {train.batch_tokens} must be a multiple of {processes}train.micro_batch_rows "
                f"{train.micro_batch_rows} * train.sequence_length {train.sequence_length} = {piece}; the next one is "
                f"{-(-train.batch_tokens // piece) * piece}"
            )
        return train.batch_tokens // piece

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of one optimizer step, those of all processes together."""
        return self.micro_batches_of_each(1)
