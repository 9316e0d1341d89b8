"""Mistakes with run folders: what is resumed, halted or begun, and what damage or somebody else left in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bad_inputs.case import TINY, BadInput, tiny, yaml
from nsa.config.load import load_config
from nsa.launch.start import prepare
from nsa.runs.checkpoints import COMPLETE, FileSum
from nsa.train.loop import train

RUN = "runs/tiny"
MORE = f"resume {RUN} --train.steps 4"
Change = Callable[[Path], object]


@cache
def finished_run() -> tempfile.TemporaryDirectory[str]:
    """A folder that holds the run of `TINY`, trained once for all cases."""
    place = tempfile.TemporaryDirectory()
    config = Path(place.name) / "c.yaml"
    config.write_text(TINY, encoding="utf-8")
    options = ["--run.folder", place.name, "--train.checkpoint_every_steps", "1"]
    options += ["--data.shuffle_window_tokens", "4096"]
    with contextlib.redirect_stdout(io.StringIO()):
        train(*prepare(load_config(config, options)))
    return place


def run(*changes: Change) -> Change:
    """A `prepare` that puts the finished run at `runs/tiny` and changes something in it."""

    def prepare_run(here: Path) -> None:
        shutil.copytree(Path(finished_run().name) / "tiny", here / RUN, symlinks=True)
        for change in changes:
            change(here / RUN)

    return prepare_run


def files(names: dict[str, bytes | None]) -> Change:
    """Write files, or remove those whose contents are None, folders too."""

    def change(folder: Path) -> None:
        for name, contents in names.items():
            path = folder / name
            if contents is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return change


def replaced(name: str, make: Change) -> Change:
    """Remove what has this name and make something else of it."""

    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return change


def link(path: Path) -> None:
    """A link to a file outside that may not be touched."""
    outside = path.parents[2] / "outside"
    outside.mkdir(exist_ok=True)
    target = outside / path.name
    target.write_text("of somebody else") if path.suffix else target.mkdir()
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.symlink_to(path.parents[2] / "absent")


def edit(old: str, new: str) -> Change:
    """Edit `config.yaml`."""

    def change(folder: Path) -> None:
        text = (folder / "config.yaml").read_text()
        assert old in text, old
        (folder / "config.yaml").write_text(text.replace(old, new))

    return change


def each_checkpoint(change: Change) -> Change:
    """Do the same to both checkpoints."""
    return lambda folder: [change(folder / "checkpoints" / name) for name in ("step_000001", "step_000002")]


def listing(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change what `complete.json` of both checkpoints says."""

    def one(checkpoint: Path) -> None:
        values = json.loads((checkpoint / COMPLETE).read_text())
        change(values)
        (checkpoint / COMPLETE).write_text(json.dumps(values))

    return each_checkpoint(one)


def planted(name: str, contents: bytes) -> Change:
    """Other contents of a file of both checkpoints, with the right checksum."""

    def one(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(contents)
        values = json.loads((checkpoint / COMPLETE).read_text())
        values["files"][name] = vars(FileSum.of(checkpoint / name))
        (checkpoint / COMPLETE).write_text(json.dumps(values))

    return each_checkpoint(one)


def flipped(name: str) -> Change:
    def one(checkpoint: Path) -> None:
        contents = bytearray((checkpoint / name).read_bytes())
        contents[len(contents) // 2] ^= 4
        (checkpoint / name).write_bytes(contents)

    return each_checkpoint(one)


def locked(folder: Path) -> None:
    """Held by another opening of the folder, as by another process."""
    HELD.append(os.open(folder, os.O_RDONLY))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)


HELD: list[int] = []


class Call:
    """Unpickling it would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("acted",)


def loop(here: Path) -> None:
    (here / "loop").symlink_to("loop")


PLACES = [
    BadInput("resume nothing", "resume", ("usage: nsa resume RUN",)),
    BadInput("resume an option", "resume --train.steps 4", ("usage: nsa resume RUN",)),
    BadInput("resume what is not there", "resume runs/absent", ("runs/absent is no run folder", "runs/NAME")),
    BadInput("resume a file", "resume c.yaml", ("c.yaml is no run folder", "runs/NAME")),
    BadInput("resume any folder", "resume .", ("is no run folder", "runs/NAME")),
    BadInput("resume the folder of runs", "resume runs", ("runs is no run folder",), run()),
    BadInput("resume the checkpoints", f"resume {RUN}/checkpoints", ("checkpoints is no run folder",), run()),
    BadInput("resume one checkpoint", f"resume {RUN}/checkpoints/step_000002", ("step_000002 is no run",), run()),
    BadInput("resume a pipe", "resume pipe", ("pipe is no run folder",), lambda here: os.mkfifo(here / "pipe")),
    BadInput("resume a link to itself", "resume loop", ("loop is no run folder",), loop),
    BadInput("resume a device", "resume /dev/zero", ("/dev/zero is no run folder",)),
    BadInput("resume a name too long", "resume " + "x" * 300, ("xxx", "too long")),
    BadInput("resume what has finished", f"resume {RUN}", ("finished its 2 steps", "--train.steps 4"), run()),
    BadInput("resume what another trains", MORE, (f"{RUN} is in use by another process", "nsa halt"), run(locked)),
    BadInput(
        "resume what another trains, without its lock file",
        MORE,
        ("is in use by another process",),
        run(locked, files({"run.lock": None})),
    ),
    BadInput(
        "resume after the checkpoints were removed",
        MORE,
        ("was finished after step 2", "holds no checkpoint; restore"),
        run(files({"checkpoints": None})),
    ),
]

OVERRIDES = [
    BadInput(f"resume with {option}", f"resume {RUN} {option}", says, run())
    for option, says in {
        "--optim.lr 1e-3": ("optim.lr", "nsa train"),
        "--run.seed 5": ("run.seed", "nsa train"),
        "--run.name other": ("run.name",),
        "--model.window_size 32": ("model.window_size",),
        "--data.source sotu": ("data.source",),
        "--train.batch_tokens 256": ("train.batch_tokens",),
        "--train.precision bf16": ("train.precision",),
        "--train.stepz 4": ("train.stepz", "train.steps"),
        "--train.steps four": ("train.steps", "four"),
        "--train.steps 0": ("steps", "0"),
        "--train.steps": ("train.steps",),
        "--train.micro_batch_rows 3": ("micro_batch_rows 3", "multiple"),
        "--run.device tpu": ("tpu", "cuda"),
        "--run.device cuda:77": ("cuda:77",),
        "--preflight.allow everything": ("everything",),
        "--train.steps 4 stray": ("stray",),
    }.items()
]

CONFIGS = [
    BadInput(
        "edited learning rate",
        MORE,
        (f"{RUN}/config.yaml is not what the run was trained with", "optim.lr: 0.003 -> 0.9", f"rm {RUN}/config.yaml"),
        run(edit("lr: 0.003", "lr: 0.9")),
    ),
    BadInput("edited window", MORE, ("window_size: 16 -> 64",), run(edit("window_size: 16", "window_size: 64"))),
    BadInput(
        "edited seed of a run without checkpoints",
        MORE,
        ("run.seed: 0 -> 8", "env.json"),
        run(edit("seed: 0", "seed: 8"), files({"checkpoints": None, "status.json": None})),
    ),
    BadInput("unknown key", MORE, ("stepz", "train.steps", "has the config"), run(edit("  steps:", "  stepz:"))),
    BadInput("no YAML", MORE, ("is not valid YAML",), run(files({"config.yaml": b"{run: [}"}))),
    BadInput("no text", MORE, ("config.yaml is not UTF-8",), run(files({"config.yaml": b"\xff\xfe\x00x"}))),
    BadInput("a list", MORE, ("config.yaml must hold sections",), run(files({"config.yaml": b"- run\n"}))),
    BadInput("a number", MORE, ("config.yaml must hold sections",), run(files({"config.yaml": b"7"}))),
    BadInput("a word for a number", MORE, ("optim.lr", "quick"), run(edit("lr: 0.003", "lr: quick"))),
    BadInput("steps that do not fit", MORE, ("batch_tokens",), run(edit("micro_batch_rows: 2", "micro_batch_rows: 7"))),
    BadInput(
        "lost with all that knows it",
        MORE,
        ("holds no config.yaml with contents", "runs/NAME"),
        run(files({"config.yaml": b"", "env.json": None, "checkpoints": None})),
    ),
    BadInput(
        "half of it lost with all that knows it",
        MORE,
        ("config.yaml has lost its sections", "train"),
        run(files({"config.yaml": b"run: {name: tiny}\n", "env.json": b"{}", "checkpoints": None})),
    ),
    BadInput(
        "a config of another version in the checkpoint",
        MORE,
        ("run_config.yaml", "novel is unknown"),
        run(planted("run_config.yaml", b"novel: {key: 1}\n")),
    ),
]

LINKS = [
    BadInput(
        f"{name} is a link", MORE, (f"{RUN}/{name} is a link to ", "outside", "remove it"), run(replaced(name, link))
    )
    for name in (
        *("run.lock", "status.json", "env.json", "data_index.json", "preflight.json", "metrics.json", "config.yaml"),
        *("training.csv", "val.csv", "health.csv", "heartbeat_rank0.jsonl", "stacks_rank0.txt", "curves.png"),
        *("report.md", "tb", "samples", "profile"),
    )
] + [
    BadInput("checkpoints is a link", MORE, ("checkpoints is a link to ",), run(replaced("checkpoints", link))),
    BadInput("a table is a dangling link", MORE, ("val.csv is a link to ",), run(replaced("val.csv", dangling))),
    BadInput("the lock is a dangling link", MORE, ("run.lock is a link to ",), run(replaced("run.lock", dangling))),
    BadInput(
        "a sample is a link",
        MORE,
        ("samples/after.txt is a link to ",),
        run(lambda folder: (folder / "samples" / "after.txt").symlink_to("/etc/hostname")),
    ),
    BadInput(
        "a board is a link",
        MORE,
        ("tb/events is a link to ",),
        run(lambda folder: (folder / "tb" / "events").symlink_to("/etc/hostname")),
    ),
    BadInput(
        "a checkpoint is a link",
        MORE,
        ("step_000009 is a link to ",),
        run(lambda folder: (folder / "checkpoints" / "step_000009").symlink_to("step_000002")),
    ),
]

KINDS = [
    BadInput(f"{name} is a {kind}", MORE, (f"{RUN}/{name} ", says, "move"), run(replaced(name, make)))
    for name, kind, make, says in (
        ("run.lock", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("run.lock", "pipe", os.mkfifo, "is a pipe or a device"),
        ("training.csv", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("training.csv", "pipe", os.mkfifo, "is a pipe or a device"),
        ("heartbeat_rank0.jsonl", "pipe", os.mkfifo, "is a pipe or a device"),
        ("stacks_rank0.txt", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("status.json", "pipe", os.mkfifo, "is a pipe or a device"),
        ("env.json", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("config.yaml", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("config.yaml", "pipe", os.mkfifo, "is a pipe or a device"),
        ("curves.png", "folder", Path.mkdir, "is a folder where a file belongs"),
        ("samples", "file", Path.touch, "must be a folder"),
        ("tb", "file", Path.touch, "must be a folder"),
        ("checkpoints", "file", Path.touch, "must be a folder"),
        ("checkpoints/step_000009", "file", Path.touch, "must be a folder"),
    )
] + [
    BadInput(
        "latest is a folder",
        MORE,
        ("checkpoints/latest must be a link", "remove it"),
        run(replaced("checkpoints/latest", Path.mkdir)),
    ),
]

DAMAGE = [
    BadInput(f"checkpoints: {name}", MORE, ("every checkpoint in", "is damaged", says, "restore one"), run(change))
    for name, says, change in (
        ("listing removed", "complete.json is missing", each_checkpoint(files({COMPLETE: None}))),
        ("listing empty", "complete.json cannot be read", each_checkpoint(files({COMPLETE: b""}))),
        ("listing is zeros", "complete.json cannot be read", each_checkpoint(files({COMPLETE: b"\0" * 900}))),
        ("listing is no text", "complete.json cannot be read", each_checkpoint(files({COMPLETE: b"\xff\xfe"}))),
        ("listing is a list", "complete.json cannot be read", each_checkpoint(files({COMPLETE: b"[1]"}))),
        ("listing is deep", "complete.json cannot be read", each_checkpoint(files({COMPLETE: b"[" * 10**5}))),
        ("listing is a folder", "complete.json is missing", each_checkpoint(replaced(COMPLETE, Path.mkdir))),
        ("listing is a pipe", "complete.json is missing", each_checkpoint(replaced(COMPLETE, os.mkfifo))),
        ("listing without ranks", "world_size", listing(lambda values: values.pop("world_size"))),
        ("listing with a word for ranks", "needs step, world_size", listing(lambda v: v.update(world_size="two"))),
        ("listing with more ranks", "for 3 ranks", listing(lambda values: values.update(world_size=3))),
        ("listing with no end of ranks", "ranks", listing(lambda values: values.update(world_size=10**12))),
        ("listing with another step", "holds step 9", listing(lambda values: values.update(step=9))),
        ("listing with more keys", "and nothing else", listing(lambda values: values.update(new=1))),
        (
            "listing with a size below zero",
            "bytes, not -1",
            listing(lambda v: v["files"]["config.json"].update(size=-1)),
        ),
        (
            "listing with a checksum of words",
            "checksum",
            listing(lambda v: v["files"]["config.json"].update(crc32="x")),
        ),
        ("listing of files as a list", "cannot be read", listing(lambda values: values.update(files=["config.json"]))),
        (
            "listing that leads outside",
            "'../../config.yaml', which lies outside",
            listing(lambda v: v["files"].update({"../../config.yaml": {"size": 1, "crc32": "0" * 8}})),
        ),
        ("model truncated", "bytes, not", each_checkpoint(files({"model.safetensors": b"x"}))),
        ("model removed", "model.safetensors is missing", each_checkpoint(files({"model.safetensors": None}))),
        ("part flipped", "__0_0.distcp is not what was written", flipped("state/__0_0.distcp")),
        ("random state flipped", "random_rank0.pt is not what was written", flipped("random_rank0.pt")),
        ("config flipped", "run_config.yaml is not what was written", flipped("run_config.yaml")),
        ("state removed", "is missing", each_checkpoint(files({"state": None}))),
        ("emptied", "complete.json is missing", each_checkpoint(lambda path: [shutil.rmtree(path), path.mkdir()])),
    )
] + [
    BadInput(
        "metadata that asks for a call",
        MORE,
        ("step_000002", ".metadata cannot be read", "mkdir", "no place in a checkpoint"),
        run(planted("state/.metadata", pickle.dumps(Call()))),
    ),
    BadInput("metadata of nothing", MORE, ("step_000002", ".metadata"), run(planted("state/.metadata", b""))),
    BadInput("a position of nothing", MORE, ("trainer.json", "step 2"), run(planted("trainer.json", b"{}"))),
    BadInput("a position without data", MORE, ("trainer.json",), run(planted("trainer.json", b'{"step": 2}'))),
    BadInput(
        "random states that ask for a call",
        MORE,
        ("random_rank0.pt",),
        run(planted("random_rank0.pt", pickle.dumps(Call()))),
    ),
    BadInput(
        "generate without a whole checkpoint",
        f"generate {RUN} --prompt a",
        ("no complete checkpoint",),
        run(each_checkpoint(files({COMPLETE: b"{}"}))),
    ),
]

HALTS = [
    BadInput("halt nothing", "halt", ("usage: nsa halt RUN",)),
    BadInput("halt an option", "halt --now", ("usage: nsa halt RUN",)),
    BadInput("halt what is not there", "halt runs/absent", ("runs/absent is no run folder",)),
    BadInput("halt a file", "halt c.yaml", ("c.yaml is no run folder",)),
    BadInput("halt any folder", "halt .", ("is no run folder: it holds no status.json",)),
    BadInput("halt a link to itself", "halt loop", ("loop is no run folder",), loop),
    BadInput("halt a name too long", "halt " + "x" * 300, ("xxx", "too long")),
    BadInput("halt what has finished", f"halt {RUN}", ("is finished at step 2; nothing to halt",), run()),
    BadInput(
        "halt with a status cut off", f"halt {RUN}", ("status.json", "touch"), run(files({"status.json": b'{"sta'}))
    ),
    BadInput(
        "halt with a list as status", f"halt {RUN}", ("status.json", "touch"), run(files({"status.json": b"[1]"}))
    ),
    BadInput("halt with a deep status", f"halt {RUN}", ("status.json",), run(files({"status.json": b"[" * 10**5}))),
    BadInput(
        "halt with a state of no kind",
        f"halt {RUN}",
        ("status.json is missing or damaged",),
        run(files({"status.json": b'{"state": ["\\u001b[2J"], "step": {}, "unix_time_s": null}'})),
    ),
    BadInput(
        "halt with a pipe as status", f"halt {RUN}", ("is no run folder",), run(replaced("status.json", os.mkfifo))
    ),
]

NEW = [
    BadInput(
        f"run name {name!r}", "train c.yaml", ("run.name", name[:20]), tiny("name: tiny", f"name: {json.dumps(name)}")
    )
    for name in ("../up", "a/b", ".hidden", "-x", "two words", "ünicode", "a;b", "")
] + [
    BadInput("run name too long", "train c.yaml", ("xxx", "at most 200"), tiny("name: tiny", f"name: {'x' * 300}")),
    BadInput("run folder is a file", "train c.yaml --run.folder c.yaml", ("c.yaml is not a folder", "--run.folder")),
    BadInput("run folder below a file", "train c.yaml --run.folder c.yaml/a/b", ("c.yaml is not a folder",)),
    BadInput("run folder is a device", "train c.yaml --run.folder /dev/null", ("/dev/null is not a folder",)),
    BadInput("run folder is a link to itself", "train c.yaml --run.folder loop", ("loop/tiny: Too many levels",), loop),
    BadInput("run folder with a zero", "train c.yaml", ("run.folder", "zero"), yaml('run: {folder: "a\\0b"}\n')),
    BadInput("run folder taken", "train c.yaml", (f"{RUN} exists already", "--run.name tiny-2"), run()),
    BadInput(
        "run folder taken by a file",
        "train c.yaml",
        (f"{RUN} exists already",),
        lambda here: files({RUN: b""})(here),
    ),
    BadInput(
        "run folder taken by a dangling link",
        "train c.yaml",
        (f"{RUN} exists already",),
        lambda here: [(here / "runs").mkdir(), (here / RUN).symlink_to("absent")],
    ),
]

CASES = [*PLACES, *OVERRIDES, *CONFIGS, *LINKS, *KINDS, *DAMAGE, *HALTS, *NEW]
