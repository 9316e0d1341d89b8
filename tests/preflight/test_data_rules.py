"""What preflight finds in the data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from corpus_files import write_parquet
from fake_hub import REPO, REVISION, FakeHub, serve
from nsa.config.run import RunConfig
from nsa.data.sources.parquet import ParquetChunks
from nsa.data.tokenizers import ByteTokenizer
from nsa.preflight.data_rules import check_data

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


def test_of_the_hub_s_files_a_few_blocks_of_one_are_streamed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=3000)) for _ in range(400)]
    files = {}
    for number in range(2):
        path = write_parquet(tmp_path / f"{number}.parquet", texts, [f"{number}-{i}" for i in range(400)])
        files[f"sample/10BT/{number:03}_00000.parquet"] = path.read_bytes()
    read_chunks = []
    read = ParquetChunks.read
    monkeypatch.setattr(ParquetChunks, "read", lambda self, chunk: read_chunks.append(chunk) or read(self, chunk))
    source = {"source": "fineweb_edu", "paths": [], "hub_repo": REPO, "hub_revision": REVISION, "heldout": 0.2}
    with serve(FakeHub(files)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert found(tiny(data=source)) == {}
    assert not [request for request in hub.requests if "001_00000" in request]
    assert len(set(read_chunks)) < 10  # of 40; two documents of a chunk of ten are held out
