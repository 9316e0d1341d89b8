"""Mistakes in model folders, in prompts for `nsa generate` and `nsa inspect`, and in a config's `model:` section."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from bad_inputs.case import BadInput, tiny
from nsa.data.tokenizers import ByteTokenizer
from nsa.hf import NSAConfig, NSAForCausalLM

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
GENERATE, INSPECT = "generate m --prompt hello --max_new_tokens 2", "inspect m --prompt hello"


@functools.cache
def whole_model() -> dict[str, bytes]:
    """The files of a model that works."""
    with tempfile.TemporaryDirectory() as folder:
        config = NSAConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1)
        NSAForCausalLM(config).save_pretrained(folder)
        ByteTokenizer().save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def model(**files: bytes | str | None) -> Callable[[Path], None]:
    """A folder `m` with a model whose files (dots as double underscores) are replaced, or left out by None."""

    def prepare(here: Path) -> None:
        changed = {name.replace("__", "."): content for name, content in files.items()}
        (here / "m").mkdir()
        for name, content in (whole_model() | changed).items():
            if content is not None:
                (here / "m" / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def config(drop: tuple[str, ...] = (), **values: Any) -> Callable[[Path], None]:
    """A model whose config.json has other values."""

    def prepare(here: Path) -> None:
        old = json.loads(whole_model()["config.json"])
        model(config__json=json.dumps({k: v for k, v in (old | values).items() if k not in drop}))(here)

    return prepare


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A model with other tensors."""
    return lambda here: model(model__safetensors=save(change(load(whole_model()["model.safetensors"]))))(here)


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """A model of which only the first part of a file is there."""

    def prepare(here: Path) -> None:
        content = whole_model()[name]
        model(**{name.replace(".", "__"): content[: int(keep * len(content))]})(here)

    return prepare


def tokenizer(**values: Any) -> Callable[[Path], None]:
    """A model whose tokenizer.json has other values."""
    return lambda here: model(tokenizer__json=json.dumps(json.loads(whole_model()["tokenizer.json"]) | values))(here)


def bpe(vocab: str, merges: str) -> Callable[[Path], None]:
    """A model with GPT-2's two tokenizer files in place of tokenizer.json."""
    return model(tokenizer__json=None, tokenizer_config__json=None, encoder__json=vocab, vocab__bpe=merges)


def then(prepare: Callable[[Path], None], change: Callable[[Path], object]) -> Callable[[Path], None]:
    """`prepare`, then a change of the folder `m`."""

    def both(here: Path) -> None:
        prepare(here)
        change(here / "m")

    return both


def replaced_by_folder(name: str) -> Callable[[Path], None]:
    def change(m: Path) -> None:
        (m / name).unlink()
        (m / name).mkdir()

    return then(model(), change)


def first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: change(x) if "norm" in name else x for name, x in tensors.items()}


def dense(here: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    NSAForCausalLM(NSAConfig(**SIZES, **heads, layer_types=["full_attention"])).save_pretrained(here / "m")
    ByteTokenizer().save(here / "m")


def run_folder(here: Path) -> None:
    (here / "m" / "checkpoints" / "step_000002").mkdir(parents=True)
    (here / "m" / "config.yaml").touch()


HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"
BAD_HEADER = struct.pack("<Q", 8) + b"not json"
REMOTE = {"model_type": "stranger", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
EVIL = "raise SystemExit('stranger code ran')"

FOLDERS = [
    BadInput("no model folder", GENERATE, ("there is no folder m", "model folder")),
    BadInput("a model that is a file", GENERATE, ("there is no folder m",), lambda here: (here / "m").touch()),
    BadInput("an empty folder", GENERATE, ("m is neither", "config.json"), lambda here: (here / "m").mkdir()),
    BadInput("a run without a checkpoint", GENERATE, ("no complete checkpoint",), run_folder),
    BadInput("inspect without a folder", INSPECT, ("there is no folder m",)),
    BadInput("inspect of an empty folder", INSPECT, ("m is neither",), lambda here: (here / "m").mkdir()),
    BadInput("config.json empty", GENERATE, ("m/config.json is damaged", "again"), model(config__json="")),
    BadInput("config.json cut off", GENERATE, ("m/config.json is damaged",), cut("config.json", 0.5)),
    BadInput("config.json of zeros", INSPECT, ("m/config.json is damaged",), model(config__json=b"\0" * 300)),
    BadInput("config.json not UTF-8", GENERATE, ("m/config.json is damaged",), model(config__json=b'{"a": "\xff"}')),
    BadInput("config.json a list", GENERATE, ("JSON object", "list"), model(config__json="[1, 2]")),
    BadInput("config.json null", GENERATE, ("JSON object", "NoneType"), model(config__json="null")),
    BadInput(
        "config.json nested without end", GENERATE, ("m/config.json is damaged",), model(config__json="[" * 200_000)
    ),
    BadInput("config.json a folder", GENERATE, ("m is neither",), replaced_by_folder("config.json")),
    BadInput("model type unknown", GENERATE, ("'stranger'", "--trust_remote_code"), config(**REMOTE)),
    BadInput(
        "model type unknown, with code",
        INSPECT,
        ("'stranger'", "--trust_remote_code"),
        then(config(**REMOTE), lambda m: (m / "evil.py").write_text(EVIL)),
    ),
    BadInput("model type absent", GENERATE, ("model_type None",), config(drop=("model_type",))),
    BadInput("model type a number", GENERATE, ("model_type 7",), config(model_type=7)),
    BadInput("model type a list", GENERATE, ("model_type ['nsa']",), config(model_type=["nsa"])),
    BadInput("model type of no language model", GENERATE, ("m cannot be loaded",), config(model_type="vit")),
]

VALUES = [
    BadInput("hidden_size as text", GENERATE, ("hidden_size", "'wide'"), config(hidden_size="wide")),
    BadInput("hidden_size null", GENERATE, ("hidden_size", "None"), config(hidden_size=None)),
    BadInput("hidden_size negative", GENERATE, ("hidden_size", "-4"), config(hidden_size=-4)),
    BadInput("hidden_size of other weights", GENERATE, ("the weights in m", "[259, 16]"), config(hidden_size=32)),
    BadInput(
        "heads that do not divide",
        GENERATE,
        ("num_attention_heads 3", "num_key_value_heads"),
        config(num_attention_heads=3, num_key_value_heads=2),
    ),
    BadInput(
        "layers without end",
        GENERATE,
        ("num_hidden_layers 10000000", "tensors"),
        config(num_hidden_layers=10_000_000, drop=("nsa_layer_types",)),
    ),
    BadInput("layers zero", GENERATE, ("num_hidden_layers", "0"), config(num_hidden_layers=0)),
    BadInput(
        "one layer more than weights",
        GENERATE,
        ("lack model.layers.1", "save_pretrained"),
        config(num_hidden_layers=2, nsa_layer_types=["nsa", "nsa"]),
    ),
    BadInput("layer types too few", GENERATE, ("layer_types has 1 entries", "2"), config(num_hidden_layers=2)),
    BadInput("layer type unknown", GENERATE, ("layer_types[0]", "'linear'", "nsa"), config(nsa_layer_types=["linear"])),
    BadInput("layer types a number", GENERATE, ("layer_types", "3"), config(nsa_layer_types=3)),
    BadInput("layer types nested", GENERATE, ("layer_types",), config(nsa_layer_types=[["nsa"]])),
    BadInput(
        "layer types twice",
        GENERATE,
        ("layer_types and nsa_layer_types differ",),
        config(layer_types=["full_attention"]),
    ),
    BadInput(
        "layers of another type than the weights",
        GENERATE,
        ("the weights in m", "have besides", "gate"),
        config(nsa_layer_types=["full_attention"]),
    ),
    BadInput("stride that does not divide", INSPECT, ("compress_stride 5", "divide"), config(compress_stride=5)),
    BadInput("window of zero", INSPECT, ("window_size", "0"), config(window_size=0)),
    BadInput("blocks as a fraction", GENERATE, ("select_block_size", "64.5"), config(select_block_size=64.5)),
    BadInput("no room for forced blocks", GENERATE, ("num_selected_blocks 1", "forced"), config(num_selected_blocks=1)),
    BadInput("compression unknown", GENERATE, ("compression", "'max'", "mean"), config(compression="max")),
    BadInput("compression a list", GENERATE, ("compression", "mean"), config(compression=["mean"])),
    BadInput("backend unknown", GENERATE, ("attention_backend", "'cuda'", "auto"), config(attention_backend="cuda")),
    BadInput("activation unknown", GENERATE, ("hidden_act", "'nope'"), config(hidden_act="nope")),
    BadInput("gate temperature of zero", GENERATE, ("gate_temperature", "0"), config(gate_temperature=0)),
    BadInput("rope type unknown", GENERATE, ("rope_type", "'spiral'"), config(rope_parameters={"rope_type": "spiral"})),
    BadInput("rope as text", GENERATE, ("rope_parameters", "'x'"), config(rope_parameters="x")),
    BadInput(
        "rope base as text",
        GENERATE,
        ("rope_theta", "'x'"),
        config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
    ),
    BadInput(
        "rope base of zero",
        GENERATE,
        ("rope_theta", "0"),
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    ),
    BadInput(
        "rope factor as text",
        GENERATE,
        ("factor", "'x'"),
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}),
    ),
    BadInput("dtype unknown", GENERATE, ("float17",), config(dtype="float17")),
    BadInput("vocabulary of a few tokens", GENERATE, ("the weights in m", "[20, 16]"), config(vocab_size=20)),
]

WEIGHTS = [
    BadInput("no weights", GENERATE, ("m holds no weights", "model.safetensors"), model(model__safetensors=None)),
    BadInput("weights empty", GENERATE, ("m/model.safetensors", "copy"), model(model__safetensors=b"")),
    BadInput("weights cut off", GENERATE, ("m/model.safetensors", "copy"), cut("model.safetensors", 0.7)),
    BadInput("weights cut in the header", INSPECT, ("m/model.safetensors",), cut("model.safetensors", 0.01)),
    BadInput("weights of text", GENERATE, ("m/model.safetensors",), model(model__safetensors="weights" * 50)),
    BadInput("weights with a huge header", GENERATE, ("m/model.safetensors",), model(model__safetensors=HUGE_HEADER)),
    BadInput("weights with a bad header", GENERATE, ("m/model.safetensors",), model(model__safetensors=BAD_HEADER)),
    BadInput("weights a folder", GENERATE, ("m/model.safetensors",), replaced_by_folder("model.safetensors")),
    BadInput(
        "weights under other names",
        GENERATE,
        ("the weights in m", "lack", "save_pretrained"),
        weights(lambda x: {f"net.{name}": y for name, y in x.items()}),
    ),
    BadInput(
        "inspect of weights under other names",
        INSPECT,
        ("the weights in m", "lack"),
        weights(lambda x: {f"net.{name}": y for name, y in x.items()}),
    ),
    BadInput(
        "one tensor missing",
        GENERATE,
        ("lack model.norm.weight", "1 in all"),
        weights(lambda x: {name: y for name, y in x.items() if name != "model.norm.weight"}),
    ),
    BadInput(
        "one tensor too many",
        GENERATE,
        ("have besides extra.weight",),
        weights(lambda x: x | {"extra.weight": torch.zeros(2)}),
    ),
    BadInput(
        "tensors of other shapes",
        GENERATE,
        ("the weights in m", "[3]", "[16]"),
        weights(lambda x: first(x, lambda y: y[:3].clone())),
    ),
    BadInput(
        "weights that are not finite",
        GENERATE,
        ("norm", "not finite"),
        weights(lambda x: first(x, lambda y: y * float("nan"))),
    ),
    BadInput("weights infinite", INSPECT, ("norm", "not finite"), weights(lambda x: first(x, lambda y: y / 0))),
    BadInput(
        "pickled weights of text",
        GENERATE,
        ("m cannot be loaded",),
        model(model__safetensors=None, pytorch_model__bin="not a pickle"),
    ),
    BadInput(
        "an index to shards that are not there",
        GENERATE,
        ("m",),
        model(model__safetensors=None, model__safetensors__index__json='{"weight_map": {"a": "b.safetensors"}}'),
    ),
]

TOKENIZERS = [
    BadInput(
        "no tokenizer",
        GENERATE,
        ("m has neither tokenizer.json",),
        model(tokenizer__json=None, tokenizer_config__json=None),
    ),
    BadInput("tokenizer empty", GENERATE, ("the tokenizer in m", "save"), model(tokenizer__json="")),
    BadInput("tokenizer cut off", GENERATE, ("the tokenizer in m",), cut("tokenizer.json", 0.6)),
    BadInput("tokenizer a list", INSPECT, ("the tokenizer in m",), model(tokenizer__json="[]")),
    BadInput("tokenizer without a model", GENERATE, ("the tokenizer in m",), tokenizer(model=None)),
    BadInput("tokenizer of an unknown model", GENERATE, ("the tokenizer in m",), tokenizer(model={"type": "Magic"})),
    BadInput(
        "tokenizer with merges of unknown tokens",
        GENERATE,
        ("the tokenizer in m",),
        tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    ),
    BadInput(
        "tokenizer with an unknown pre-tokenizer",
        GENERATE,
        ("the tokenizer in m",),
        tokenizer(pre_tokenizer={"type": "Magic"}),
    ),
    BadInput("tokenizer_config cut off", GENERATE, ("the tokenizer in m",), cut("tokenizer_config.json", 0.5)),
    BadInput("tokenizer_config a list", GENERATE, ("the tokenizer in m",), model(tokenizer_config__json="[1]")),
    BadInput(
        "tokenizer without an end",
        GENERATE,
        ("no end-of-text token", "eos_token"),
        model(tokenizer_config__json='{"tokenizer_class": "PreTrainedTokenizerFast"}'),
    ),
    BadInput("BPE with a damaged vocabulary", GENERATE, ("m/encoder.json", "again"), bpe('{"a": 0', "#version: 0.2\n")),
    BadInput("BPE with a vocabulary of lists", GENERATE, ("m/encoder.json",), bpe('["a"]', "#version: 0.2\n")),
    BadInput("BPE with a merge of one", GENERATE, ("m/vocab.bpe",), bpe('{"a": 0}', "#version: 0.2\na\n")),
    BadInput("BPE with an unknown merge", GENERATE, ("m/vocab.bpe",), bpe('{"a": 0}', "#version: 0.2\nb c\n")),
    BadInput("BPE without tokens", GENERATE, ("cannot encode 'e', 'h'",), bpe("{}", "#version: 0.2\n")),
]

GENERATION = [
    BadInput("generation_config cut off", GENERATE, ("m/generation_config.json",), cut("generation_config.json", 0.5)),
    BadInput("generation_config a list", GENERATE, ("m/generation_config.json",), model(generation_config__json="[]")),
    BadInput(
        "generation_config with a wrong value",
        GENERATE,
        ("m/generation_config.json",),
        model(generation_config__json='{"early_stopping": "maybe"}'),
    ),
    BadInput(
        "generation_config with a negative value",
        GENERATE,
        ("m/generation_config.json",),
        model(generation_config__json='{"max_new_tokens": -1}'),
    ),
]

PROMPTS = [
    BadInput("no prompt", "generate m", ("--prompt",), model()),
    BadInput("an empty prompt", "generate m --prompt=", ("the prompt is empty",), model()),
    BadInput("inspect with an empty prompt", "inspect m --prompt=", ("the prompt is empty",), model()),
    BadInput("a layer that is not there", f"{INSPECT} --layer 9", ("--layer 9", "choose one of 0"), model()),
    BadInput("a model without NSA layers", INSPECT, ("no NSA layer",), dense),
    BadInput("a position behind the prompt", f"{INSPECT} --ranges --position 50", ("--position", "0..4"), model()),
    BadInput("a position that is a word", f"{INSPECT} --ranges --position first", ("--position", "'first'"), model()),
]

SECTION = [
    BadInput(
        "section: unknown layer type",
        "train c.yaml",
        ("model.layer_types", "linear"),
        tiny("hidden_size: 16,", "hidden_size: 16, layer_types: [linear],"),
    ),
    BadInput(
        "section: heads that do not divide",
        "train c.yaml",
        ("num_attention_heads", "num_key_value_heads"),
        tiny("num_key_value_heads: 1", "num_key_value_heads: 3"),
    ),
    BadInput(
        "section: stride that does not divide",
        "train c.yaml",
        ("compress_stride 3", "divide"),
        tiny("compress_stride: 4", "compress_stride: 3"),
    ),
    BadInput("section: odd heads", "train c.yaml", ("head_dim", "even"), tiny("hidden_size: 16,", "hidden_size: 14,")),
    BadInput(
        "section: hidden size of text",
        "train c.yaml",
        ("model.hidden_size",),
        tiny("hidden_size: 16,", "hidden_size: wide,"),
    ),
    BadInput(
        "section: hidden size of zero",
        "train c.yaml",
        ("model.hidden_size", "0"),
        tiny("hidden_size: 16,", "hidden_size: 0,"),
    ),
    BadInput(
        "section: gate unknown",
        "train c.yaml",
        ("model.gate", "softmax"),
        tiny("hidden_size: 16,", "hidden_size: 16, gate: relu,"),
    ),
    BadInput(
        "section: backend unknown",
        "train c.yaml",
        ("model.attention_backend",),
        tiny("hidden_size: 16,", "hidden_size: 16, attention_backend: cudnn,"),
    ),
    BadInput(
        "section: triton on a CPU",
        "train c.yaml",
        ("triton", "torch"),
        tiny("hidden_size: 16,", "hidden_size: 16, attention_backend: triton,"),
    ),
    BadInput(
        "section: forced blocks without room",
        "train c.yaml",
        ("num_selected_blocks 2", "forced"),
        tiny("num_selected_blocks: 3", "num_selected_blocks: 2"),
    ),
]

CASES = [*FOLDERS, *VALUES, *WEIGHTS, *TOKENIZERS, *GENERATION, *PROMPTS, *SECTION]
