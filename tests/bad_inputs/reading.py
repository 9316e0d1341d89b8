"""Mistakes in what reads runs and results: `nsa watch`, `nsa compare` and `nsa smoke`, and files that are damaged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.case import BadInput

TRAINING = "step,tokens,loss,lr,grad_norm,tokens_per_s,mfu,step_s,fetch_s\n1,100,5.0,0.1,1.0,100.0,,1.0,0.0\n"
VALIDATION = "step,val_loss,val_ppl,val_bits_per_byte\n0,5.5,244.7,7.9\n1,5.0,148.4,7.2\n"
LINKS = "&a [x, x, x, x, x, x, x, x, x]"
BOMB = f"a: {LINKS}\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(8)
)
DEEP = "[" * 100_000

Prepare = Callable[[Path], object]


def status(**changes: Any) -> str:
    """A `status.json`; None takes a key out."""
    values = {"state": "running", "step": 1, "reason": None, "rank": None, "unix_time_s": time.time(), **changes}
    return json.dumps({name: value for name, value in values.items() if value != "absent"})


def beat(**changes: Any) -> str:
    """A line of a heartbeat; "absent" takes a key out."""
    values = {
        "unix_time_s": time.time(),
        "rank": 0,
        "world_size": 1,
        "host": "elsewhere",
        "pid": 99,
        "process_start_s": 1.7e9,
        "phase": "step",
        "progress_age_s": 0.5,
        "start_step": 0,
        "step": 1,
        "num_steps": 9,
        "loss": 5.0,
        "counters": {},
        **changes,
    }
    return json.dumps({name: value for name, value in values.items() if value != "absent"}) + "\n"


def run(**files: str | bytes | Prepare | None) -> Prepare:
    """A `prepare` that makes a run folder `r` with some files in another way, by name with `__` for the dot.

    None leaves a file out; a function is called with its path.
    """
    contents: dict[str, str | bytes | Prepare | None] = {
        "status__json": status(),
        "training__csv": TRAINING,
        "val__csv": VALIDATION,
        "heartbeat_rank0__jsonl": beat(),
        "config__yaml": "train: {steps: 9}\n",
        **files,
    }

    def prepare(here: Path) -> None:
        folder = here / "r"
        folder.mkdir()
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            if callable(content):
                content(path)
            elif content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def baseline(**changes: Any) -> Prepare:
    """A `prepare` that makes a smoke baseline `b.json`."""
    values = {"val_loss": 3.0, "train_loss": 3.0, "tokens_per_s": 100.0, "machine": {}, **changes}
    return written("b.json", json.dumps({name: value for name, value in values.items() if value != "absent"}))


def written(name: str, text: str | bytes) -> Prepare:
    """A `prepare` that makes a file."""
    return lambda here: (here / name).write_bytes(text.encode() if isinstance(text, str) else text)


def no_newline(path: Path) -> None:
    """A file of 64 MB, on disk almost nothing, that is one line without an end."""
    with path.open("wb") as file:
        file.truncate(2**26)


def watch(name: str, says: tuple[str, ...], **files: str | bytes | Prepare | None) -> BadInput:
    """A run folder that `nsa watch` cannot use."""
    return BadInput(f"watch: {name}", "watch r --once", says, run(**files))


def status_json(name: str, content: str | bytes | Prepare) -> BadInput:
    """A `status.json` that says nothing."""
    return watch(f"status.json {name}", ("r/status.json is missing or damaged", "nsa resume r"), status__json=content)


def a_beat(name: str, says: tuple[str, ...], **changes: Any) -> BadInput:
    """A heartbeat whose second line holds a mistake."""
    lines = beat() + beat(**changes)
    says = ("r/heartbeat_rank0.jsonl, line 2", *says, "damaged line")
    return watch(f"a beat with {name}", says, heartbeat_rank0__jsonl=lines)


def threshold(name: str, value: str, *says: str) -> BadInput:
    """A threshold that `nsa watch` refuses before it looks."""
    command = f"watch r --once --thresholds.{name} {value}"
    return BadInput(f"threshold {name} {value}", command, (f"thresholds.{name}", *says), run())


def compare(
    name: str, says: tuple[str, ...], command: str = "r --out o", **files: str | bytes | Prepare | None
) -> BadInput:
    """A run folder that `nsa compare` cannot use."""
    return BadInput(f"compare: {name}", f"compare {command}", says, run(**files))


def smoke(name: str, says: tuple[str, ...], prepare: Prepare) -> BadInput:
    """A baseline that `nsa smoke` cannot use."""
    command = "smoke --device cpu --baseline b.json"
    return BadInput(f"smoke: {name}", command, ("the baseline b.json cannot be used", *says), prepare)


WATCH_OPTIONS = [
    BadInput("watch without a run", "watch", ("RUN must be given", "--help")),
    BadInput("watch two runs", "watch r r", ("'r'", "one word too many"), run()),
    BadInput("watch with an unknown option", "watch r --intervals_s 3", ("intervals_s", "interval_s"), run()),
    BadInput("watch no folder", "watch absent --once", ("there is no absent", "runs/NAME")),
    BadInput("watch a file", "watch c.yaml --once", ("c.yaml is a file", "give the folder of a run")),
    BadInput("watch the folder of runs", "watch . --once", ("is no run folder", "runs/NAME"), run()),
    *(
        BadInput(f"interval {value}", f"watch r --interval_s {value}", ("--interval_s", says), run())
        for value, says in (
            *(("0", "above 0"), ("-1", "above 0"), ("nan", "finite"), ("inf", "finite"), ("1e9", "at most")),
            ("soon", "soon"),
        )
    ),
    threshold("stall_s", "nan", "finite"),
    threshold("stall_s", "inf", "finite"),
    threshold("silent_s", "-1", "at least 0"),
    threshold("silent_s", "soon", "soon"),
    threshold("throughput_drop", "nan", "finite"),
    threshold("throughput_drop", "1.5", "from 0 to 1"),
    threshold("throughput_min_beats", "0", "at least 1"),
    threshold("memory_growth", "-inf", "finite"),
    threshold("memory_min_beats", "2.5", "2.5"),
    threshold("loss_rise_nats", "inf", "finite"),
    threshold("loss_beats", "0", "at least 1"),
    threshold("warmup_steps", "-3", "at least 0"),
    threshold("gate_entropy_mean_nats", "2", "from 0 to 1.099"),
    threshold("gate_max_mean", "nan", "finite"),
    threshold("gate_collapse_share", "-0.1", "from 0 to 1"),
    threshold("halt_after_s", "nan", "finite"),
    BadInput("an unknown threshold", "watch r --thresholds.stal_s 3", ("stal_s", "stall_s"), run()),
]

DAMAGED_STATUS = [
    status_json("is empty", ""),
    status_json("is no JSON", "{"),
    status_json("is a list", "[1]"),
    status_json("is binary", b"\xff\xfe\x00"),
    status_json("without a state", status(state="absent")),
    status_json("of an unknown state", status(state="sleeping")),
    status_json("with a number as state", status(state=3)),
    status_json("without a step", status(step="absent")),
    status_json("with a text as step", status(step="one")),
    status_json("with null as step", status(step=None)),
    status_json("with a text as time", status(unix_time_s="now")),
    status_json("is nested without end", DEEP),
    watch("status.json is a folder", ("is no run folder",), status__json=Path.mkdir),
    watch("status.json is a pipe", ("is no run folder",), status__json=os.mkfifo),
]

DAMAGED_BEATS = [
    watch("a heartbeat that is no JSON", ("heartbeat_rank0.jsonl, line 1", "JSON"), heartbeat_rank0__jsonl="beat\n"),
    watch("a heartbeat of a list", ("line 1", "damaged line"), heartbeat_rank0__jsonl="[1]\n"),
    watch("a binary heartbeat", ("line 1", "damaged line"), heartbeat_rank0__jsonl=b"\xff\x00\xfe\n"),
    watch("a heartbeat in UTF-16", ("line 1", "damaged line"), heartbeat_rank0__jsonl=beat().encode("utf-16")),
    watch("a heartbeat nested without end", ("line 1", "damaged line"), heartbeat_rank0__jsonl=DEEP + "\n"),
    watch("a heartbeat without lines", ("no line within its last",), heartbeat_rank0__jsonl=no_newline),
    watch("a heartbeat that is a folder", ("is no file",), heartbeat_rank0__jsonl=Path.mkdir),
    watch("a heartbeat that is a pipe", ("is no file",), heartbeat_rank0__jsonl=os.mkfifo),
    watch("a heartbeat of another rank", ("beat of rank 3",), heartbeat_rank0__jsonl=beat(rank=3, world_size=4)),
    a_beat("no process", ("pid",), pid="absent"),
    a_beat("process 0", ("pid", "1"), pid=0),
    a_beat("a negative process", ("pid",), pid=-1),
    a_beat("a process beyond all numbers", ("pid",), pid=2**40),
    a_beat("a negative rank", ("rank",), rank=-1),
    a_beat("no ranks at all", ("world_size",), world_size=0),
    a_beat("a thousand million ranks", ("world_size",), world_size=10**9),
    a_beat("an unknown phase", ("phase", "'startup'"), phase="asleep"),
    a_beat("an escape sequence as phase", ("phase",), phase="\x1b[2J"),
    a_beat("a negative step", ("step",), step=-1),
    a_beat("a text as step", ("step",), step="one"),
    a_beat("a step beyond all numbers", ("step",), step=10**30),
    a_beat("a time that is no number", ("unix_time_s",), unix_time_s="NaN"),
    a_beat("an infinite time", ("unix_time_s",), unix_time_s="Infinity"),
    a_beat("a time beyond all times", ("unix_time_s",), unix_time_s=1e300),
    a_beat("a negative age", ("progress_age_s",), progress_age_s=-5),
    a_beat("an infinite speed", ("tokens_per_s",), tokens_per_s="Infinity"),
    a_beat("a text as loss", ("loss",), loss="low"),
    a_beat("a list as gate", ("gate",), gate=[1]),
    a_beat("a gate without its parts", ("gate.num_rows",), gate={}),
    a_beat("a number as host", ("host",), host=3),
    a_beat("a host name without end", ("host", "300"), host="x" * 100_000),
    a_beat("a list as counters", ("counters",), counters=[1]),
    a_beat("a negative counter", ("counters.skipped_steps",), counters={"skipped_steps": -1}),
    a_beat("a counter named by an escape sequence", (r"counters.\x1b[2J",), counters={"\x1b[2J": -1}),
    a_beat("a thousand counters", ("counters", "100"), counters={str(k): k for k in range(1000)}),
]

COMPARE = [
    BadInput("compare nothing", "compare", ("RUNS must be given", "--help")),
    BadInput("compare no folder", "compare absent", ("there is no absent", "runs/NAME")),
    BadInput("compare a file", "compare c.yaml", ("c.yaml is a file",)),
    BadInput("compare the folder of runs", "compare .", ("is no run folder",), run()),
    compare("twice the same", ("given twice",), "r r --out o"),
    compare("more than a picture can show", ("1 to 20", "21"), " ".join(["r"] * 21)),
    compare("an unknown option", ("--output", "--out"), "r --output o"),
    compare(
        "a folder in the picture's place",
        ("o.png is no file", "--out"),
        extra=lambda path: (path.parents[1] / "o.png").mkdir(),
    ),
    compare("results under a file", ("c.yaml/o", "--out"), "r --out c.yaml/o"),
    compare("a damaged status", ("status.json is missing or damaged",), status__json="{"),
    compare("before its first step", ("training has not begun", "wait"), training__csv=None),
    compare("a table that is a folder", ("training has not begun",), training__csv=Path.mkdir),
    compare("an emptied table", ("training.csv", "lacks step, tokens, loss"), training__csv=""),
    compare("a table of something else", ("training.csv", "lacks step", "a;b"), training__csv="a;b\n1;2\n"),
    compare(
        "a text in a table", ("training.csv, line 2", "loss is 'low'"), training__csv=TRAINING.replace("5.0", "low")
    ),
    compare(
        "a step that is no whole number", ("line 2", "step is '1.5'"), training__csv=TRAINING.replace("\n1,", "\n1.5,")
    ),
    compare(
        "a cell too few",
        ("line 2 has 8 cells, not 9", "take the damaged lines out"),
        training__csv=TRAINING.replace(",0.0", ""),
    ),
    compare("a cell too many", ("line 2 has 10 cells",), training__csv=TRAINING.replace(",0.0", ",0.0,1")),
    compare("an escape sequence in a table", (r"\\x1b[2J",), training__csv=TRAINING.replace("5.0", "\x1b[2J")),
    compare("a number without end", ("line 2", "not a"), training__csv=TRAINING.replace("100,", f"{'9' * 4000}x,")),
    compare("a binary table", ("training.csv", "lacks"), training__csv=b"\xff\xfe\x00\x01\n"),
    compare("no table of evaluations", ("val.csv is missing",), val__csv=None),
    compare("a damaged table of evaluations", ("val.csv, line 3",), val__csv=VALIDATION.replace("148.4", "?")),
    compare("evaluations without a loss", ("val.csv", "lacks val_loss"), val__csv="step,val_ppl\n"),
    compare("a damaged table of gates", ("health.csv", "lacks"), health__csv="gates\n"),
    compare("a config that is no YAML", ("r/config.yaml", "is not valid YAML"), config__yaml="train: {"),
    compare("a config that unfolds without end", ("r/config.yaml", "aliases"), config__yaml=BOMB),
    compare("a config with a key twice", ("r/config.yaml", "steps twice"), config__yaml="train: {steps: 1, steps: 2}"),
    compare("a config that is nested without end", ("r/config.yaml", "nested"), config__yaml="[" * 5_000),
    compare("a config that is a folder", ("r/config.yaml is no file",), config__yaml=Path.mkdir),
    compare("a config that is a pipe", ("r/config.yaml is no file",), config__yaml=os.mkfifo),
    compare("a damaged heartbeat", ("heartbeat_rank0.jsonl, line 1",), heartbeat_rank0__jsonl="beat\n"),
]

SMOKE = [
    BadInput("smoke: tolerance nan", "smoke --tolerance_percent nan", ("--tolerance_percent", "finite")),
    BadInput("smoke: tolerance inf", "smoke --tolerance_percent inf", ("--tolerance_percent", "finite")),
    BadInput("smoke: a negative tolerance", "smoke --tolerance_percent -1", ("--tolerance_percent", "-1")),
    BadInput("smoke: a text as tolerance", "smoke --tolerance_percent much", ("--tolerance_percent", "much")),
    BadInput("smoke: an unknown device", "smoke --device abacus", ("abacus",)),
    BadInput("smoke: a folder that is there", "smoke --device cpu --folder .", ("exists already", "--folder")),
    BadInput("smoke: a folder under a file", "smoke --device cpu --folder c.yaml/x", ("c.yaml", "--folder")),
    BadInput("smoke: a word", "smoke cpu", ("'cpu'", "one word too many")),
    BadInput(
        "smoke: a baseline to write under a file",
        "smoke --device cpu --update_baseline --baseline c.yaml/b.json",
        ("c.yaml/b.json", "--baseline"),
    ),
    smoke("no baseline", ("No such file", "--update_baseline"), lambda here: None),
    smoke("a folder", ("no file of a few figures",), lambda here: (here / "b.json").mkdir()),
    smoke("a pipe", ("no file of a few figures",), lambda here: os.mkfifo(here / "b.json")),
    smoke("an empty file", ("--update_baseline",), written("b.json", "")),
    smoke("no JSON", ("--update_baseline",), written("b.json", "{")),
    smoke("a list", ("list",), written("b.json", "[1]")),
    smoke("nested without end", ("--update_baseline",), written("b.json", DEEP)),
    smoke("a binary file", ("--update_baseline",), written("b.json", b"\xff\xfe\x00")),
    smoke("far too large", ("no file of a few figures",), written("b.json", " " * 2_000_000)),
    smoke("a figure too few", ("val_loss",), baseline(val_loss="absent")),
    smoke("a figure too many", ("more",), baseline(more=1)),
    smoke("a text as figure", ("val_loss is 'low'",), baseline(val_loss="low")),
    smoke("a figure that is true", ("train_loss is True",), baseline(train_loss=True)),
    smoke("a negative figure", ("tokens_per_s is -1",), baseline(tokens_per_s=-1)),
    smoke("a figure that is no number", ("val_loss is nan",), baseline(val_loss=float("nan"))),
    smoke("a list as machine", ("machine is [1]",), baseline(machine=[1])),
    smoke("a list as calibration", ("calibration",), baseline(calibration=[1])),
    smoke("half a calibration", ("gib_per_s",), baseline(calibration={"gflops": 1.0})),
    smoke("a calibration of nothing", ("gflops is 0",), baseline(calibration={"gflops": 0, "gib_per_s": 1.0})),
    smoke("a text as calibration", ("gflops is 'fast'",), baseline(calibration={"gflops": "fast", "gib_per_s": 1.0})),
]

CASES = [*WATCH_OPTIONS, *DAMAGED_STATUS, *DAMAGED_BEATS, *COMPARE, *SMOKE]
