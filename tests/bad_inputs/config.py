"""Mistakes in a config file and in the overrides behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from yaml import safe_dump, safe_load

from bad_inputs.case import TINY, BadInput, tiny, yaml

MISSING = [
    BadInput("no such config", "train absent.yaml", ("absent.yaml", "configs/")),
    BadInput("nearly a config of the package", "train train_showcas", ("train_showcas", "did you mean train_showcase")),
    BadInput("a folder as config", "train {here}", ("{here}", "is a folder")),
    BadInput("a device as config", "train /dev/null", ("/dev/null", "no regular file")),
    BadInput("two configs", "train c.yaml d.yaml", ("'d.yaml'", "one word too many")),
    BadInput("a dangling link", "train l.yaml", ("l.yaml",), lambda here: (here / "l.yaml").symlink_to("gone")),
    BadInput("a name of 5000 letters", f"train {'n' * 5000}.yaml", ("nnn",)),
    BadInput("a name of 300 letters", f"train {'n' * 300}.yaml", ("nnn",)),
]


def damaged(name: str, content: str | bytes, *says: str) -> BadInput:
    """A `c.yaml` that is not to be read."""
    data = content if isinstance(content, bytes) else content.encode()
    return BadInput(name, "train c.yaml", ("c.yaml", *says), lambda here: (here / "c.yaml").write_bytes(data))


BOMB = "k0: &k0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
YAML = [
    BadInput("unknown key", "train c.yaml", ("train.stepz", "train.steps"), tiny("steps: 2,", "stepz: 2,")),
    damaged("unknown section", "trane: {steps: 2}", "trane", "did you mean train"),
    damaged("a key in the wrong section", "optim: {steps: 2}", "optim.steps", "train.steps"),
    damaged("an unknown key without a neighbour", "eval: {qqqqq: 2}", "eval.qqqqq", "eval.rows"),
    damaged("nine unknown sections", "".join(f"z{i}: 1\n" for i in range(9)), "9 wrong entries", "and 1 more"),
    damaged("a long key", "x" * 1000 + ": 1", "xxx", "..."),
    damaged("a key of 100 kB", "x" * 100_000 + ": 1", "line 1"),
    damaged("a list", "- train", "must hold sections"),
    damaged("a text", "hello", "must hold sections"),
    damaged("a number", "3", "must hold sections"),
    damaged("two documents", "train: {}\n---\ntrain: {}", "line 2", "single document"),
    damaged("an open bracket", "train: {steps: 3", "line 1", "expected"),
    damaged("a tab as indentation", "train:\n\tsteps: 3", "line 2", "cannot start any token"),
    damaged("a colon in a value", "run:\n  name: a: b", "line 2", "not allowed here"),
    damaged("a key at another depth", "train:\n  steps: 3\n warmup: 3", "line 3"),
    damaged("a section twice", "train: {steps: 3}\nrun: {}\ntrain: {steps: 4}", "train twice", "line 1", "line 3"),
    damaged("a key twice", "train:\n  steps: 3\n  steps: 4", "train.steps twice", "line 2", "line 3"),
    damaged("a key twice in braces", "train: {steps: 3, steps: 4}", "train.steps twice"),
    damaged("a section as a number", "train: 3", "train", "key: value", "3"),
    damaged("a section as a list", "train: [steps]", "train", "key: value"),
    damaged("a number as section", "7: {steps: 3}", "7", "name"),
    damaged("a number as key", "train: {7: 3}", "train.7", "name"),
    damaged("a list as key", "? [a, b]\n: 3", "line 1", "plain name"),
    damaged("nothing as key", "train: {null: 3}", "train", "name"),
    damaged("an unknown alias", "train: *gone", "line 1", "undefined alias"),
    damaged("an alias to itself", "train: &t {steps: *t}", "line 1", "alias"),
    damaged("an alias bomb", BOMB, "unfolds to more than"),
    damaged("an alias bomb in a key", BOMB.replace("k8:", "model:"), "unfolds to more than"),
    damaged("a merge of a text", "train: {<<: steps}", "line 1", "merging"),
    damaged("nesting without end", "- " * 60_000, "nested too deep"),
    damaged("nested mappings without end", "{a: " * 20_000, "nested too deep"),
    damaged("a tag of Python's", "run: !!python/object/apply:os.system [ls]", "line 1", "could not determine"),
    damaged("an unknown tag", "run: {name: !gpu a}", "line 1", "!gpu"),
    damaged("a number of 5000 digits", "run: {seed: " + "9" * 5000 + "}", "not valid YAML", "digits"),
    damaged("a NUL", b"run: {name: a\0b}", "line 1", "0x0"),
    damaged("an escaped NUL", 'run: {folder: "a\\0b"}', "run.folder", "NUL"),
    damaged("an escape sequence", b"run: {name: \x1b[2J}", "line 1", "0x1b"),
    damaged("an escaped escape sequence", 'run: {name: "\\e[2J"}', "run.name", "x1b[2J"),
    damaged("UTF-16", "run: {name: a}".encode("utf-16"), "UTF-8"),
    damaged("Latin-1", b"run: {name: caf\xe9}", "UTF-8"),
    damaged("a checkpoint's bytes", bytes(range(256)) * 8, "UTF-8"),
    damaged("JSON Lines", '{"text": "a"}\n{"text": "b"}\n', "line 2"),
    damaged("a megabyte", "# " + "x" * 2**20, "bytes", "no config"),
]


def given(name: str, text: str) -> Callable[[Path], object]:
    """A `prepare` that gives a key of the tiny config another value, as YAML writes it."""
    section, _, key = name.partition(".")
    values = safe_load(TINY)
    keys = values.pop(section, {})
    keys.pop(key, None)
    lines = [f"  {line}\n" for line in safe_dump(keys).splitlines() if keys]
    return yaml(safe_dump(values) + f"{section}:\n{''.join(lines)}  {key}: {text}\n")


# Key, value as it stands in the file, and what the message says besides the key.
VALUES = [
    ("run.name", "''", "letters"),
    ("run.name", "../up", "letters"),
    ("run.name", "a/b", "letters"),
    ("run.name", ".hidden", "a letter or digit first"),
    ("run.name", "two words", "'two words'"),
    ("run.name", "7", "quotes"),
    ("run.name", "[a]", "text"),
    ("run.name", "null", "text"),
    ("run.name", "n" * 300, "at most 200"),
    ("run.folder", "''", "at least 1 character"),
    ("run.folder", "{a: b}", "text"),
    ("run.seed", "-1", "greater than or equal to 0"),
    ("run.seed", "1.5", "integer"),
    ("run.seed", "18446744073709551616", "less than"),
    ("run.seed", "true", "integer"),
    ("run.seed", "'7'", "integer"),
    ("run.seed", "010", "'010'"),
    ("run.device", "mps", "cuda:N"),
    ("run.device", "cuda:x", "cuda:N"),
    ("run.device", "0", "text"),
    ("run.num_threads", "0", "greater than or equal to 1"),
    ("run.num_threads", "100000", "4096"),
    ("run.num_threads", "all", "integer"),
    ("run.deterministic", "1", "boolean"),
    ("run.deterministic", "maybe", "boolean"),
    ("model.hidden_size", "0", "greater than or equal to 1"),
    ("model.hidden_size", "1000000000", "less than or equal to"),
    ("model.hidden_size", "1e3", "integer"),
    ("model.num_hidden_layers", "10000000", "1000"),
    ("model.num_hidden_layers", "true", "integer"),
    ("model.num_attention_heads", "-2", "greater than or equal to 1"),
    ("model.head_dim", "0", "greater than or equal to 1"),
    ("model.layer_types", "nsa", "list"),
    ("model.layer_types", "[]", "at least 1 item"),
    ("model.layer_types", "[linear]", "full_attention"),
    ("model.rope_theta", ".inf", "finite"),
    ("model.rms_norm_eps", "0", "greater than 0"),
    ("model.initializer_range", "-0.1", "greater than 0"),
    ("model.tie_word_embeddings", "1", "boolean"),
    ("model.window_size", "1000000000000", "less than or equal to"),
    ("model.compression", "max", "'conv'"),
    ("model.gate", "relu", "'sigmoid'"),
    ("model.gate_temperature", ".nan", "finite"),
    ("model.attention_backend", "cuda", "'triton'"),
    ("data.source", "web", "'sotu'"),
    ("data.text_split", "lines", "'paragraphs'"),
    ("data.tokenizer", "3", "text"),
    ("data.heldout", "1.5", "below 1"),
    ("data.heldout", ".nan", "below 1"),
    ("data.heldout", "true", ""),
    ("data.max_eval_tokens", "0", "greater than or equal to 1"),
    ("data.synthetic_task", "sort", "'recall'"),
    ("data.synthetic_length", "1", "greater than or equal to 2"),
    ("data.synthetic_length", "1000000000", "less than or equal to"),
    ("data.hub_revision", "main", "pattern"),
    ("data.prefetch_batches", "1000000000", "4096"),
    ("data.stall_timeout_s", ".inf", "finite"),
    ("data.first_batch_timeout_s", "0", "greater than 0"),
    ("optim.lr", "0", "greater than 0"),
    ("optim.lr", ".nan", "finite"),
    ("optim.lr", "'0.1'", "number"),
    ("optim.lr", "fast", "'fast'"),
    ("optim.min_lr_ratio", "2", "less than or equal to 1"),
    ("optim.warmup_steps", "-1", "greater than or equal to 0"),
    ("optim.beta1", "1", "less than 1"),
    ("optim.eps", "0", "greater than 0"),
    ("optim.weight_decay", "-1", "greater than or equal to 0"),
    ("optim.max_grad_norm", ".inf", "finite"),
    ("train.steps", "0", "greater than or equal to 1"),
    ("train.steps", "true", "True"),
    ("train.steps", "2.5", "2.5"),
    ("train.steps", "1000000000000", "less than or equal to"),
    ("train.steps", "null", "None"),
    ("train.steps", "2026-01-02", "'2026-01-02'"),
    ("train.sequence_length", "1", "greater than or equal to 2"),
    ("train.micro_batch_rows", "0", "greater than or equal to 1"),
    ("train.precision", "fp8", "'bf16'"),
    ("train.parallel", "tp", "'fsdp2'"),
    ("train.collective_timeout_s", "1e300", "less than or equal to"),
    ("train.compile", "1", "boolean"),
    ("train.keep_checkpoints", "0", "greater than or equal to 1"),
    ("guards.on_nonfinite", "ignore", "'skip'"),
    ("guards.spike_factor", "1", "greater than 1"),
    ("guards.spike_factor", ".nan", "finite"),
    ("guards.entropy_floor_nats", ".nan", "finite"),
    ("eval.every_steps", "0", "greater than or equal to 1"),
    ("sample.prompts", "hello", "list"),
    ("sample.prompts", "['']", "at least 1 character"),
    ("sample.max_new_tokens", "1000000000", "less than or equal to"),
    ("sample.temperature", "0", "greater than 0"),
    ("sample.top_p", "1.5", "less than or equal to 1"),
    ("observe.heartbeat_s", ".inf", "finite"),
    ("observe.heartbeat_s", "1e9", "3600"),
    ("observe.heartbeat_s", "0", "0.01"),
    ("observe.health_layers", "[-1]", "greater than or equal to 0"),
    ("observe.profile_steps", "[5, 3]", "after last step 3"),
    ("observe.profile_steps", "[1]", "profile_steps"),
    ("preflight.allow", "[leeks]", "did you mean 'leak'"),
    ("preflight.allow", "[data-source]", "cannot be overridden"),
    ("preflight.allow", "leak", "list"),
]
KEYS = [
    BadInput(f"{name}: {text[:30]}", "train c.yaml", (name, said), given(name, text)) for name, text, said in VALUES
]

TOGETHER = [
    ("model.num_key_value_heads 3", "model.num_key_value_heads", "3", ("multiple of num_key_value_heads 3",)),
    ("a stride that divides no block", "model.compress_stride", "5", ("compress_stride 5 must divide",)),
    ("fewer blocks than forced ones", "model.num_selected_blocks", "1", ("num_selected_blocks 1",)),
    ("a block of no tokens", "model.select_block_size", "0", ("select_block_size",)),
    ("a window of no tokens", "model.window_size", "0", ("window_size",)),
    ("layer types of another depth", "model.layer_types", "[nsa, nsa]", ("layer_types needs 1 entry",)),
    ("more parameters than any model", "model.hidden_size", "1048576", ("parameters", "hidden_size")),
    ("tokens that no rows hold", "train.batch_tokens", "100", ("multiple of", "the next one is 128")),
    ("rows that no step holds", "train.micro_batch_rows", "3", ("multiple of", "the next one is 192")),
    ("paths of no source", "data.paths", "[a.txt]", ("reads no files", "a.txt")),
    ("a source without paths", "data.source", "text", ('source "text" needs paths',)),
]
PAIRS = [BadInput(name, "train c.yaml", ("c.yaml", *says), given(key, text)) for name, key, text, says in TOGETHER]

OVERRIDES = [
    BadInput(f"option {text}", f"train c.yaml {text}", says)
    for text, says in [
        ("--train.stepz 3", ("--train.stepz is unknown", "--train.steps")),
        ("--steps 3", ("--steps is unknown", "--train.steps")),
        ("--train 3", ("--train is unknown",)),
        ("--trian.steps 3", ("--trian.steps is unknown", "--train.steps")),
        ("--train.steps", ("--train.steps needs a value",)),
        ("--train.steps 1 2", ("'2'", "one word too many")),
        ("--train.steps many", ("--train.steps", "'many'")),
        ("--train.steps 1e3", ("--train.steps", "whole number", "'1e3'")),
        ("--train.steps true", ("--train.steps", "'true'")),
        ("--train.steps=", ("--train.steps", "''")),
        ("--train.steps 0", ("--train.steps", "greater than or equal to 1")),
        ("--train.steps -3", ("--train.steps", "-3")),
        ("--train.steps " + "9" * 400, ("--train.steps", "whole number")),
        ("--train.compile maybe", ("--train.compile", "true or false")),
        ("--train.compile 2", ("--train.compile", "true or false")),
        ("--train.precision fp8", ("--train.precision", "'bf16'")),
        ("--optim.lr nan", ("--optim.lr", "finite")),
        ("--optim.lr inf", ("--optim.lr", "finite")),
        ("--optim.lr fast", ("--optim.lr", "'fast'")),
        ("--optim.lr -1", ("--optim.lr", "greater than 0")),
        ("--optim.lr null", ("--optim.lr", "'null'")),
        ("--run.device mps", ("--run.device", "cuda:N")),
        ("--run.name ../up", ("--run.name", "letters")),
        ("--run.seed 18446744073709551616", ("--run.seed", "less than")),
        ("--model.layer_types linear", ("--model.layer_types", "full_attention")),
        ("--model.layer_types []", ("--model.layer_types", "at least 1 item")),
        ("--observe.profile_steps 1", ("--observe.profile_steps", "2 values, not 1")),
        ("--observe.profile_steps 5 3", ("--observe.profile_steps", "after last step 3")),
        ("--preflight.allow leeks", ("--preflight.allow", "leak")),
        ("--sample.prompts", ("--sample.prompts needs a value",)),
        ("--data.heldout 1.5", ("--data.heldout", "below 1")),
        ("--guards.spike_factor nan", ("--guards.spike_factor", "finite")),
        ("--train.batch_tokens 100", ("batch_tokens 100", "the next one is 128")),
        ("-x 3", ("'-x'", "--section.key value")),
        ("--" + "x" * 5000, ("is unknown",)),
    ]
]

CASES = [*MISSING, *YAML, *KEYS, *PAIRS, *OVERRIDES]
