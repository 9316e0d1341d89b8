"""The doctor's judgement: what it looks at, and what makes a machine unusable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from nsa.preflight import doctor
from nsa.preflight.doctor import check_kernel, check_kernels, diagnose, hub

SECRET = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def test_this_machine_is_usable_and_described(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path)
    assert diagnosis.problems == ()
    values = json.loads(diagnosis.json())
    assert values["usable"] is True
    assert values["versions"]["torch"] == torch.__version__
    assert values["disk"]["free_gib"] > 0
    assert values["cpu"]["memory_gib"] > 0
    assert {"nccl", "gloo"} == set(values["processes"])
    assert values["hub"]["reachable"].startswith("no: ")
    text = diagnosis.text()
    assert f"torch              {torch.__version__}" in text
    assert "reference cpu" in text
    assert text.endswith("\nusable")


def test_every_backend_of_the_cpu_is_run_against_the_reference() -> None:
    checks = {check.backend: check for check in check_kernels() if check.device == "cpu"}
    assert list(checks) == ["reference", "torch"]
    for check in checks.values():
        assert check.problem is None
        assert check.relative_error is not None
        assert 0 < check.relative_error < 1e-4


def test_a_backend_that_is_wrong_or_does_not_run_makes_the_machine_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = doctor.nsa_attention

    def wrong(q: Any, *arguments: Any, backend: str, **options: Any) -> Any:
        return operator(q * (1.01 if backend == "torch" else 1.0), *arguments, backend=backend, **options)

    monkeypatch.setattr(doctor, "nsa_attention", wrong)
    check = check_kernel("torch", torch.device("cpu"), torch.float32)
    assert check.problem is not None
    assert check.problem.startswith("wrong: ")
    assert any("torch" in problem and "wrong" in problem for problem in diagnose().problems)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(doctor, "nsa_attention", broken)
    diagnosis = diagnose()
    assert any("did not run: RuntimeError: no kernel image" in problem for problem in diagnosis.problems)
    assert diagnosis.text().endswith("\nunusable")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MIN_DISK_GIB", 1e9, "GiB of disk are free"),
        ("NEEDED_PACKAGES", ("numpy", "no_such_package"), "not installed: no_such_package; pip install"),
        ("PYTHON", (3, 99), "3.99 or newer is needed"),
        ("TORCH", ((9, 0), (9, 9)), "at least 9.0 is needed"),
    ],
)
def test_what_is_missing_is_a_problem(name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, name, value)
    assert [problem for problem in diagnose().problems if words in problem]


def test_a_newer_torch_is_a_remark_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH", ((2, 0), (2, 1)))
    diagnosis = diagnose()
    assert diagnosis.problems == ()
    assert any("newer than any that was tried (2.0)" in remark for remark in diagnosis.remarks)


@contextmanager
def hub_that_answers(monkeypatch: pytest.MonkeyPatch, status: int, body: str) -> Iterator[list[str | None]]:
    """A server in place of the Hub; yields the tokens that it gets."""
    tokens: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        yield tokens
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_login_is_named_and_its_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: SECRET)
    with hub_that_answers(monkeypatch, 200, '{"name": "someone"}') as tokens:
        diagnosis = diagnose()
    assert tokens == [f"Bearer {SECRET}"]
    assert diagnosis.facts["hub"]["login"] == "as someone"
    assert diagnosis.facts["hub"]["reachable"] == "yes"
    assert SECRET not in diagnosis.text() + diagnosis.json()


def test_without_a_login_the_hub_is_reachable_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_that_answers(monkeypatch, 401, "{}") as tokens:
        facts = hub(3.0)
    assert tokens == [None]
    assert facts["reachable"] == "yes"
    assert facts["login"].startswith("none")


def test_a_token_that_is_not_valid_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: SECRET)
    with hub_that_answers(monkeypatch, 401, "{}"):
        assert "not valid" in hub(3.0)["login"]


def test_a_hub_that_fails_or_babbles_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_that_answers(monkeypatch, 503, ""):
        assert hub(3.0)["reachable"] == "no: HTTP 503"
    with hub_that_answers(monkeypatch, 200, "<html>"):
        assert "not JSON" in hub(3.0)["reachable"]


def test_offline_mode_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_that_answers(monkeypatch, 200, "{}") as tokens:
        assert "offline mode" in hub(3.0)["reachable"]
    assert tokens == []
