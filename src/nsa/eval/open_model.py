"""Models for the commands: a transformers folder, or the newest checkpoint of a run folder, with its tokenizer."""

from __future__ import annotations

import json
import textwrap
import unicodedata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import logging

import nsa.hf  # noqa: F401  (registers the model with the auto classes)
from nsa.data.tokenizers import Tokenizer, load_tokenizer
from nsa.device import choose_device
from nsa.runs.checkpoints import newest_checkpoint

# What configs and weights that do not fit raise in transformers and in the model classes.
MISFITS = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, ImportError),
    *(SafetensorError, StrictDataclassError, UnpicklingError),
)
MAX_NAMES, MAX_CHARACTERS = 3, 400


def load_model(
    folder: Path, device: str = "auto", *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """Model, ready for inference, and tokenizer.

    Args:
        folder: a transformers folder (config.json, model.safetensors, tokenizer files), or a run folder, of which the
            newest complete checkpoint is taken.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        trust_remote_code: run Python code that the folder brings for its model.

    Raises:
        ValueError: there is no such folder or device, or the folder holds no model, no complete checkpoint, damaged
            files, or weights that are not those of its config.json.
    """
    target = choose_device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = _model_folder(folder)
    config = _read_object(folder / "config.json")
    model_type = config.get("model_type")
    if not trust_remote_code and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {_brief(repr(model_type))}, which transformers does not know; "
            f"--trust_remote_code runs code that the folder brings, if you trust who made it"
        )
    _check_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    try:
        _check_generation(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_loaded names them
        )
    except MISFITS as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {_brief(error)}") from error
    model, report = loaded
    _check_loaded(folder, model, report)
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} in {folder} cannot continue a text; give a causal language model")
    model.generation_config = GenerationConfig()  # the commands' options decide
    assert isinstance(model, PreTrainedModel)
    return model.eval().to(target), tokenizer  # pyright: ignore[reportArgumentType]


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a transformers model folder or a run folder")
    if (folder / "config.json").is_file():
        return folder
    if not (folder / "checkpoints").is_dir() and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is neither a transformers model folder (no config.json) nor a run folder (no checkpoints)"
        )
    return newest_checkpoint(folder)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; change its permissions or copy it again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {_brief(error)}; save or copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}; save or copy it again")
    return values


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """The weights are readable, and there are tensors for all layers: too many layers take hours to build."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if not list(folder.glob("*.bin")):
            raise ValueError(f"{folder} holds no weights (no model.safetensors); save or copy the model again")
        return
    num_tensors = 0
    for path in files:
        try:
            path.open("rb").close()  # safetensors calls a file that may not be read absent
            with safe_open(path, framework="pt") as file:
                num_tensors += len(file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be loaded: {_brief(error)}; copy it again, or take another") from error
    num_layers = config.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > num_tensors:
        raise ValueError(
            f"{folder / 'config.json'} has num_hidden_layers {num_layers} but the weights only {num_tensors} tensors; "
            f"they do not belong together"
        )


def _check_generation(folder: Path) -> None:
    """transformers passes over a generation_config.json that it cannot read."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    values = _read_object(path)
    try:
        GenerationConfig.from_dict(values).validate()
    except MISFITS as error:
        raise ValueError(f"{path}: {_brief(error)}; mend or delete it") from error


def _check_loaded(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Every weight comes from the folder, and is a number."""
    for what, keys in (("lack", report["missing_keys"]), ("have besides", report["unexpected_keys"])):
        if keys:
            names = ", ".join(sorted(keys)[:MAX_NAMES]) + (", ..." if len(keys) > MAX_NAMES else "")
            raise ValueError(
                f"the weights in {folder} are not those of its config.json: they {what} {_brief(names)} ({len(keys)} "
                f"in all); save the model again with save_pretrained, or mend the names"
            )
    for name, held, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {name} is {list(held)} but the config asks for "
            f"{list(wanted)}; take both from one model"
        )
    for name, x in model.named_parameters():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} in {folder} holds numbers that are not finite; take another checkpoint")


def _brief(error: object) -> str:
    return textwrap.shorten(str(error), MAX_CHARACTERS, placeholder=" ...")


def encode_prompt(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a prompt, all of which the model knows.

    Raises:
        ValueError: the prompt is empty, the tokenizer loses characters of it, or the model has no such tokens.
    """
    ids = tokenizer.encode(prompt)
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    known = _folded(tokenizer.decode(ids))
    lost = sorted({character for character in prompt if not _folded(character) <= known})
    if lost:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} cannot encode {', '.join(map(repr, lost))} of the prompt; leave them "
            f"out, or use a model with a byte-level tokenizer"
        )
    if not ids:
        raise ValueError(f"the tokenizer {tokenizer.name!r} makes no token of {prompt!r}; give a prompt with words")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} gives token {max(ids)} but the model knows 0..{vocab_size - 1}; "
            f"tokenizer and model do not belong together"
        )
    return ids


def _folded(text: str) -> set[str]:
    """Characters of a text less case, accents and spaces, which tokenizers may normalise."""
    characters = unicodedata.normalize("NFKD", text.casefold())
    return {c for c in characters if not unicodedata.combining(c) and not c.isspace()}
