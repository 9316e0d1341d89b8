"""What preflight finds in the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa.data.tokenizers import ByteTokenizer
from nsa.train.config import RunConfig
from nsa.train.preflight.data_rules import check_data

Tiny = Callable[..., RunConfig]


def found(config: RunConfig, tokenizer: Any = None, world_size: int = 1) -> dict[str, str]:
    """Code -> message."""
    findings = check_data(config, tokenizer or ByteTokenizer(), world_size)
    return {finding.code: finding.message for finding in findings}


def test_sound_data_have_no_findings(tiny: Tiny) -> None:
    assert found(tiny()) == {}


def test_a_missing_or_malformed_source_is_found_with_its_place(tiny: Tiny, tmp_path: Path) -> None:
    absent = tmp_path / "absent.txt"
    assert str(absent) in found(tiny(data={"paths": [str(absent)]}))["data-source"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    lines = {"source": "jsonl", "paths": [str(broken)]}
    assert f"{broken}:2" in found(tiny(data=lines))["data-source"]


def test_too_little_data_for_one_batch_of_all_processes_are_found(tiny: Tiny) -> None:
    # 120 paragraphs of some 220 bytes, a fifth of them held out, fill about 330 rows of 64.
    long = {"steps": 1, "micro_batch_rows": 128, "batch_tokens": 4 * 128 * 64}
    assert found(tiny(train=long)) == {}
    message = found(tiny(train=long), world_size=4)["data-source"]
    assert "one batch of all ranks takes 512" in message


def test_a_held_out_set_that_is_empty_or_matches_nothing_is_found(tiny: Tiny) -> None:
    assert "no document is held out" in found(tiny(data={"heldout": 0.0}))["data-source"]
    assert '"zzz*" matches none' in found(tiny(data={"heldout": ["zzz*"]}))["data-source"]


def test_a_held_out_text_under_another_name_is_found(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    rows = [{"id": f"d{number}", "text": f"text number {number} " * 40} for number in range(40)]
    rows.append({"id": "copy", "text": rows[7]["text"] + "\n"})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {"source": "jsonl", "paths": [str(path)], "heldout": ["d7"]}
    message = found(tiny(data=values))["heldout-overlap"]
    assert message == "the training document 'copy' is the held-out 'd7'"
    assert found(tiny(data=values | {"heldout": ["d8"]})) == {}
    blocks = values | {"in_memory_mib": 0}
    assert found(tiny(data=blocks))["heldout-overlap"] == message
    assert found(tiny(data=blocks | {"heldout": ["d7", "copy"]})) == {}


def test_many_passes_over_the_data_are_mentioned(tiny: Tiny) -> None:
    message = found(tiny(train={"steps": 600}))["data-repeats"]
    assert "the run reads the 120 documents" in message


def test_tokens_beyond_the_vocabulary_are_found(tiny: Tiny) -> None:
    class Wrong(ByteTokenizer):
        def encode_batch(self, texts: Any) -> list[np.ndarray]:
            return [ids.astype(np.uint32) + 200 for ids in super().encode_batch(texts)]

    assert "its vocabulary has 259" in found(tiny(), Wrong())["tokenizer"]


def test_synthetic_data_in_place_of_others_are_said(tiny: Tiny, tmp_path: Path) -> None:
    values = {"paths": [str(tmp_path / "absent.txt")], "on_error": "synthetic"}
    assert "SYNTHETIC DATA" in found(tiny(data=values))["data-replaced"]


def test_the_hub_is_asked_for_one_file_to_stream(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(config: Any) -> None:
        asked.append((config.hub_access, config.hub_num_files))
        raise ValueError("the Hub cannot be reached")

    monkeypatch.setattr("nsa.train.preflight.data_rules.open_corpus", refuse)
    config = tiny(data={"source": "fineweb_edu", "paths": []})
    assert found(config) == {"data-source": "the Hub cannot be reached"}
    assert asked == [("stream", 1)]
