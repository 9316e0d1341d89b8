"""Models for the commands: a transformers folder, or the newest checkpoint of a run folder, with its tokenizer."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import logging

import nsa.hf  # noqa: F401  (registers the model with the auto classes)
from nsa.data.tokenizers import Tokenizer, load_tokenizer
from nsa.train.checkpoint import check_readable, newest_checkpoint
from nsa.train.device import choose_device


def load_model(folder: Path, device: str = "auto") -> tuple[PreTrainedModel, Tokenizer]:
    """Model, ready for inference, and tokenizer.

    Args:
        folder: a transformers folder (config.json, model.safetensors, tokenizer files), or a run folder, of which the
            newest complete checkpoint is taken.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: there is no such folder or device, or the folder holds no model, no complete checkpoint or damaged
            files.
    """
    target = choose_device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a transformers model folder or a run folder")
    if not (folder / "config.json").is_file():
        if not (folder / "checkpoints").is_dir() and not (folder / "config.yaml").is_file():
            raise ValueError(
                f"{folder} is neither a transformers model folder (no config.json) nor a run folder (no checkpoints)"
            )
        folder = newest_checkpoint(folder)
    check_readable(folder)
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    return model.eval().to(target), tokenizer  # pyright: ignore[reportArgumentType]


def encode_prompt(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a prompt, all of which the model knows.

    Raises:
        ValueError: the prompt is empty, the tokenizer loses characters of it, or the model has no such tokens.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    known = _folded(tokenizer.decode(ids))
    lost = sorted({character for character in prompt if not _folded(character) <= known})
    if lost:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} cannot encode {', '.join(map(repr, lost))} of the prompt; leave them "
            f"out, or use a model with a byte-level tokenizer"
        )
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
