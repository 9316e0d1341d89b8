"""Mistakes in the arguments of every command."""

from __future__ import annotations

from pathlib import Path

from bad_inputs.case import BadInput


def run_folder(here: Path) -> None:
    """A run folder as far as the commands look before they read anything."""
    run = here / "runs" / "a"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "step": 2, "unix_time_s": 1.0}')
    (run / "config.yaml").write_text("run: {name: a}\n")


def model_folder(here: Path) -> None:
    """A folder that is there, for what is refused before a model is loaded."""
    (here / "m").mkdir()


def results(here: Path) -> None:
    """Results of a benchmark."""
    (here / "old.csv").write_text("length\n1\n")
    (here / "folder.csv").mkdir()


def prompts(here: Path) -> None:
    """A model folder and files that are no prompt."""
    model_folder(here)
    (here / "latin.txt").write_bytes(b"caf\xe9")
    (here / "empty.txt").write_text("")
    (here / "folder").mkdir()


NSA = [
    BadInput("a mistyped command", "trian", ("'trian'", "did you mean `nsa train`")),
    BadInput("an unknown command", "qqqq", ("'qqqq'", "choose one of train")),
    BadInput("a command of 5000 letters", "q" * 5000, ("choose one of train",)),
    BadInput("an option before the command", "--device cpu train c.yaml", ("'--device'",)),
    BadInput("a command in capitals", "TRAIN c.yaml", ("'TRAIN'",)),
]
TRAIN = [
    BadInput("train without a config", "train", ("usage: nsa train CONFIG",)),
    BadInput("train with options alone", "train --train.steps 3", ("usage: nsa train CONFIG",)),
    BadInput("resume without a run", "resume", ("usage: nsa resume RUN",)),
    BadInput("resume of nothing", "resume runs/gone", ("runs/gone", "no run folder")),
    BadInput("resume of a file", "resume c.yaml", ("c.yaml", "no run folder")),
    BadInput(
        "resume with an unknown key", "resume runs/a --train.stepz 3", ("--train.stepz", "--train.steps"), run_folder
    ),
    BadInput("resume with a word too many", "resume runs/a runs/b", ("'runs/b'", "one word too many"), run_folder),
    BadInput("resume with a wrong value", "resume runs/a --train.steps many", ("--train.steps", "'many'"), run_folder),
    BadInput("halt without a run", "halt", ("usage: nsa halt RUN",)),
    BadInput("halt of nothing", "halt runs/gone", ("runs/gone", "no run folder")),
    BadInput("halt with an option", "halt --now", ("usage: nsa halt RUN",)),
    BadInput("halt of a finished run", "halt runs/a", ("runs/a is finished", "nothing to halt"), run_folder),
]
PREFLIGHT = [
    BadInput("preflight without a config", "preflight", ("CONFIG must be given", "nsa preflight --help")),
    BadInput("preflight of nothing", "preflight gone.yaml", ("gone.yaml",)),
    BadInput("preflight for no GPU", "preflight c.yaml --for abacus", ("abacus", "NVIDIA H200")),
    BadInput("preflight for several GPUs", "preflight c.yaml --for nvidia", ("nvidia", "NVIDIA H200")),
    BadInput("preflight with a for without a name", "preflight c.yaml --for", ("--for needs a value",)),
    BadInput("preflight for no processes", "preflight c.yaml --world_size 0", ("--world_size", "0")),
    BadInput("preflight for half a process", "preflight c.yaml --world_size 0.5", ("--world_size", "whole number")),
    BadInput("preflight with an unknown option", "preflight c.yaml --jsn", ("--jsn is unknown", "did you mean --json")),
    BadInput("preflight with an unknown key", "preflight c.yaml --optim.lrr 1", ("--optim.lrr", "--optim.lr")),
    BadInput("preflight with a wrong value", "preflight c.yaml --optim.lr -1", ("--optim.lr", "greater than 0")),
    BadInput("preflight of two configs", "preflight c.yaml d.yaml", ("'d.yaml'", "one word too many")),
    BadInput("preflight with json as a word", "preflight c.yaml --json=perhaps", ("--json must be true or false",)),
]
DATA = [
    BadInput("data without an action", "data", ("usage: nsa data check CONFIG",)),
    BadInput("data with another action", "data chekc c.yaml", ("'chekc'", "nsa data check CONFIG")),
    BadInput("data check without a config", "data check", ("usage: nsa data check CONFIG",)),
    BadInput("data check of nothing", "data check gone.yaml", ("gone.yaml",)),
    BadInput("data check of no batches", "data check c.yaml --batches 0", ("--batches", "0")),
    BadInput("data check of many batches", "data check c.yaml --batches many", ("--batches", "'many'")),
    BadInput(
        "data check of endless batches", "data check c.yaml --batches 99999999999", ("--batches", "1,000,000,000")
    ),
    BadInput("data check with an unknown option", "data check c.yaml --batchs 3", ("--batchs", "--batches")),
    BadInput("data check with an unknown key", "data check c.yaml --data.pahts a", ("--data.pahts", "--data.paths")),
    BadInput("data check with a wrong source", "data check c.yaml --data.source web", ("--data.source", "'sotu'")),
]
DOCTOR = [
    BadInput("doctor of no folder", "doctor --folder gone", ("there is no folder gone", "--folder")),
    BadInput("doctor of a file", "doctor --folder c.yaml", ("c.yaml",)),
    BadInput("doctor without time", "doctor --hub_timeout_s 0", ("--hub_timeout_s", "0")),
    BadInput("doctor with time in words", "doctor --hub_timeout_s soon", ("--hub_timeout_s", "'soon'")),
    BadInput("doctor with endless time", "doctor --hub_timeout_s inf", ("--hub_timeout_s", "finite")),
    BadInput("doctor with an unknown option", "doctor --jsom", ("--jsom", "did you mean --json")),
    BadInput("doctor with a word", "doctor now", ("'now'", "one word too many")),
    BadInput("configs of another name", "configs train_copie", ("'train_copie'", "train_copy")),
    BadInput("configs with two names", "configs train_copy track_a", ("'track_a'", "one word too many")),
    BadInput("configs with an option", "configs --all", ("--all is unknown",)),
]
GENERATE = [
    BadInput(f"generate {text}", f"generate {text}", says, prompts)
    for text, says in [
        ("", ("MODEL must be given", "nsa generate --help")),
        ("m", ("--prompt TEXT", "--prompt_file FILE")),
        ("m --prompt a --prompt_file b", ("--prompt_file", "one of them")),
        ("gone --prompt a", ("there is no folder gone",)),
        ("c.yaml --prompt a", ("c.yaml",)),
        ("m --prompt", ("--prompt needs a value",)),
        ("m --prompt_file gone.txt", ("gone.txt", "no such file")),
        ("m --prompt_file folder", ("folder", "no such file")),
        ("m --prompt_file /dev/zero", ("/dev/zero",)),
        ("m --prompt_file latin.txt", ("latin.txt", "UTF-8")),
        ("m --prompt a --device mps", ("'mps'", "cuda:N")),
        ("m --prompt a --device", ("--device needs a value",)),
        ("m --prompt a --num_threads 0", ("--num_threads", "from 1 to")),
        ("m --prompt a --num_threads all", ("--num_threads", "'all'")),
        ("m --prompt a --num_threads 99999", ("--num_threads", "4096")),
        ("m --prompt a --max_new_tokens 0", ("--max_new_tokens", "0")),
        ("m --prompt a --max_new_tokens 1e3", ("--max_new_tokens", "'1e3'")),
        ("m --prompt a --max_new_tokens 99999999999", ("--max_new_tokens", "99999999999")),
        ("m --prompt a --temperature 0", ("--temperature", "--greedy")),
        ("m --prompt a --temperature nan", ("--temperature", "finite")),
        ("m --prompt a --top_k -1", ("--top_k", "-1")),
        ("m --prompt a --top_k 0.5", ("--top_k", "'0.5'")),
        ("m --prompt a --top_p 0", ("--top_p", "0")),
        ("m --prompt a --top_p 1.1", ("--top_p", "1.1")),
        ("m --prompt a --seed -1", ("--seed", "-1")),
        ("m --prompt a --seed 18446744073709551616", ("--seed", "18446744073709551616")),
        ("m --prompt a --greedy=perhaps", ("--greedy", "true or false")),
        ("m --promt a", ("--promt is unknown", "did you mean --prompt")),
        ("m n --prompt a", ("'n'", "one word too many")),
    ]
]
INSPECT = [
    BadInput(f"inspect {text}", f"inspect {text}", says, prompts)
    for text, says in [
        ("", ("MODEL must be given", "nsa inspect --help")),
        ("m", ("--prompt TEXT", "--prompt_file FILE")),
        ("gone --prompt a", ("there is no folder gone",)),
        ("m --prompt a --layer -1", ("--layer", "-1")),
        ("m --prompt a --layer first", ("--layer", "'first'")),
        ("m --prompt a --position first", ("--position", "'first'")),
        ("m --prompt a --position -1", ("--position", "'-1'")),
        ("m --prompt a --out folder", ("--out folder", "is a folder")),
        ("m --prompt a --out gone/x.jsonl", ("gone/x.jsonl", "no gone")),
        ("m --prompt a --out c.yaml/x.jsonl", ("c.yaml/x.jsonl",)),
        ("m --prompt a --device tpu", ("'tpu'", "cuda:N")),
        ("m --prompt_file latin.txt", ("latin.txt", "UTF-8")),
        ("m --prompt a --num_threads -2", ("--num_threads", "-2")),
        ("m --prompt a --range", ("--range is unknown", "did you mean --ranges")),
    ]
]
WATCH = [
    BadInput(f"watch {text}", f"watch {text}", says, run_folder)
    for text, says in [
        ("", ("RUN must be given", "nsa watch --help")),
        ("runs/gone", ("runs/gone", "give the folder of a run")),
        ("c.yaml", ("c.yaml", "give the folder of a run")),
        ("runs/a runs/b", ("'runs/b'", "one word too many")),
        ("runs/a --interval_s 0", ("--interval_s", "0")),
        ("runs/a --interval_s nan", ("--interval_s", "finite")),
        ("runs/a --interval_s inf", ("--interval_s", "finite")),
        ("runs/a --interval_s 1e300", ("--interval_s", "86400")),
        ("runs/a --halt maybe", ("'maybe'",)),
        ("runs/a --onec", ("--onec is unknown", "did you mean --once")),
        ("runs/a --thresholds.stall_s nan", ("--thresholds.stall_s", "finite")),
        ("runs/a --thresholds.stall_s -1", ("thresholds.stall_s", "-1")),
        ("runs/a --thresholds.loss_beats 1.5", ("--thresholds.loss_beats", "'1.5'")),
        ("runs/a --thresholds.stal_s 1", ("--thresholds.stal_s", "--thresholds.stall_s")),
        ("runs/a --thresholds.gate_max_mean inf", ("--thresholds.gate_max_mean", "finite")),
    ]
]
COMPARE = [
    BadInput("compare of nothing", "compare", ("RUNS must be given", "nsa compare --help")),
    BadInput("compare with an unknown option", "compare runs/a --uot x", ("--uot is unknown", "did you mean --out")),
    BadInput("compare without a path", "compare runs/a --out", ("--out needs a value",)),
    BadInput("smoke on another device", "smoke --device tpu", ("'tpu'", "cuda:N")),
    BadInput("smoke with a tolerance in words", "smoke --tolerance_percent some", ("--tolerance_percent", "'some'")),
    BadInput("smoke with a tolerance of nan", "smoke --tolerance_percent nan", ("--tolerance_percent", "finite")),
    BadInput("smoke below no tolerance", "smoke --tolerance_percent -1", ("--tolerance_percent", "-1")),
    BadInput("smoke with a word", "smoke all", ("'all'", "one word too many")),
    BadInput("smoke with an unknown option", "smoke --basline x", ("--basline", "did you mean --baseline")),
]
BENCH = [
    BadInput(f"bench {text}", f"bench {text}", says, results)
    for text, says in [
        ("prefil", ("'prefil'", "did you mean `nsa bench prefill`")),
        ("speed", ("'speed'", "choose one of prefill")),
        ("prefill --lenghts 8", ("--lenghts is unknown", "did you mean --lengths")),
        ("prefill --lengths", ("--lengths needs a value",)),
        ("prefill --lengths long", ("--lengths", "'long'")),
        ("prefill --lengths 0", ("at least 1", "0")),
        ("prefill --geometry 32 16", ("--geometry", "7 values, not 2")),
        ("prefill --dtype int8", ("--dtype", "'bfloat16'")),
        ("prefill --dense_backend fast", ("--dense_backend", "'cudnn'")),
        ("prefill --dense=perhaps", ("--dense", "true or false")),
        ("prefill --device mps", ("'mps'", "cuda:N")),
        ("prefill --device cuda:99", ("cuda:99",)),
        ("prefill --lengths 40 --num_kv_heads 3 --no_memory", ("multiple of the 3",)),
        ("prefill --lengths 40 --repeats 0 --no_memory", ("repeats must be at least 1", "0")),
        ("prefill --out old.csv", ("old.csv", "--overwrite")),
        ("prefill --out folder.csv --overwrite", ("folder.csv",)),
        ("prefill --out gone/a.csv", ("gone/a.csv", "no folder gone")),
        ("prefill --out results.txt", ("results.txt", ".csv")),
        ("prefill --train.steps 3", ("--train.steps is unknown",)),
        ("decode --contexts 64 32", ("ascend", "64")),
        ("decode --contexts 0", ("ascend", "0")),
        ("decode --batch 0", ("batch 0", "at least 1")),
        ("train gone.yaml", ("gone.yaml",)),
        ("train c.yaml --train.stepz 3", ("--train.stepz", "--train.steps")),
        ("train c.yaml --optim.lr nan", ("--optim.lr", "finite")),
        ("train c.yaml --documents some", ("--documents", "'packed'")),
        ("train c.yaml --steps 0 --device cpu", ("steps must be at least 1", "0")),
        ("train c.yaml d.yaml", ("'d.yaml'", "one word too many")),
        ("train c.yaml --overrides a=b", ("--overrides is unknown",)),
        ("telemetry gone.yaml", ("gone.yaml",)),
        ("telemetry c.yaml --device gpu", ("'gpu'", "cuda:N")),
    ]
]

CASES = [*NSA, *TRAIN, *PREFLIGHT, *DATA, *DOCTOR, *GENERATE, *INSPECT, *WATCH, *COMPARE, *BENCH]
