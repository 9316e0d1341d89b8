"""The `nsa` command: `nsa COMMAND ...`; `nsa --help` lists the commands.

Each command is one line in `COMMANDS` and one module here with `main(arguments) -> exit code`; the module is imported
only when its command runs, so that `nsa --help` is quick. Exit codes: 0 done, 1 the work failed, 2 bad input, 3 stopped
on request after a checkpoint, 130 interrupted (Ctrl-C) otherwise, 141 the reader of the output went away (`| head`).
"""

from __future__ import annotations

import atexit
import difflib
import gc
import importlib
import io
import os
import sys
from collections.abc import Collection, Sequence

from nsa import __version__
from nsa.config.options import OptionError
from nsa.terminal import printable, redacted

# The interpreter's last search for garbage among the libraries' objects takes seconds on a slow machine.
atexit.register(gc.freeze)

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 3, 130, 141

# Command name -> (module with `main`, one line of help).
COMMANDS = {
    "train": ("nsa.cli.train", "train a model from a YAML config"),
    "resume": ("nsa.cli.resume", "resume a run from its newest whole checkpoint"),
    "halt": ("nsa.cli.halt", "stop a run after its current step, with a checkpoint"),
    "preflight": ("nsa.cli.preflight", "say what a run needs and what is wrong with it, before it starts"),
    "doctor": ("nsa.cli.doctor", "say whether this machine can train and run models"),
    "watch": ("nsa.cli.watch", "watch a run: a live table, alarms, stacks of a hung process, halt"),
    "smoke": ("nsa.cli.smoke", "check everything from kernels to a resumed run, against a baseline"),
    "generate": ("nsa.cli.generate", "continue a text, printed as it is produced"),
    "inspect": ("nsa.cli.inspect", "show which blocks of a prompt each query selects"),
    "bench": ("nsa.cli.bench", "measure speed and memory on this machine"),
    "configs": ("nsa.cli.configs", "list the configs of the package, or print one"),
    "data": ("nsa.cli.data", "check a config's data: run its loader alone, with timings"),
    "page": ("nsa.cli.page", "write the page of a run, with another run's losses beside its own"),
    "compare": ("nsa.cli.compare", "draw the loss curves of several runs into one picture and table"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process unless given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a command
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has had enough. Nothing may be left for the interpreter to write at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return code


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_USAGE
    name, *rest = arguments
    if name == "--version":
        print(f"nsa {__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        return unknown("nsa", "command", name, COMMANDS)
    module, _ = COMMANDS[name]
    try:
        return importlib.import_module(module).main(rest)
    except (OptionError, PermissionError) as error:
        return fail(name, error)
    except SystemExit as end:  # after the help of a command
        return end.code if isinstance(end.code, int) else EXIT_DONE
    except KeyboardInterrupt as interrupt:
        print("\n  ".join([f"nsa {name}: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        return EXIT_INTERRUPTED


def usage() -> str:
    """The text of `nsa --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    head = (
        "usage: nsa [--version] COMMAND ...\n\nNative Sparse Attention: train, look into and use models.\n\ncommands:\n"
    )
    return head + "\n".join(lines) + "\n\n`nsa COMMAND --help` explains one command."


def unknown(program: str, what: str, name: str, known: Collection[str]) -> int:
    """Print a name that `program` does not know with the nearest that it does, and return the exit code for it."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{program} {near[0]}`?" if near else f"choose one of {', '.join(known)}"
    print(f"{program}: unknown {what} {name[:60]!r}; {hint}", file=sys.stderr)
    return EXIT_USAGE


def explained(error: Exception) -> str:
    """What an error says to a user: what the system refused has its file first, and the remedy."""
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} is closed to user {os.getuid()}: {error.strerror}; change its rights or its owner"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def fail(command: str, error: Exception) -> int:
    """Print a user's mistake as one message, without a traceback, and return the exit code for it."""
    if isinstance(error, BrokenPipeError):
        raise error
    print(f"nsa {command}: {printable(redacted(explained(error)))}", file=sys.stderr)
    return EXIT_USAGE
