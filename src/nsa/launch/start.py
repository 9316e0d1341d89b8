"""The beginning of a run: everything is checked and built, and only then is its folder made.

config = load_config("configs/train_showcase.yaml")
with setup_parallel(config.run.device, config.train.parallel) as parallel:
    trainer, folder = prepare(config, parallel=parallel)
    outcome = train(trainer, folder)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from nsa.config.load import dump_config
from nsa.config.run import RunConfig
from nsa.launch.budget import fit_to_budget
from nsa.launch.environment import snapshot
from nsa.preflight.examine import examine, examine_corpus
from nsa.runs.folder import RunFolder, check_unused
from nsa.terminal import printable
from nsa.train.model import training_route
from nsa.train.parallel import Parallel, on_main, one_process
from nsa.train.summary import data_index, describe
from nsa.train.trainer import Trainer


def prepare(
    config: RunConfig, command: Sequence[str] = (), parallel: Parallel | None = None
) -> tuple[Trainer, RunFolder]:
    """Build and check everything, say what is about to run, and only then make the run folder.

    With `train.max_minutes` its parts are timed first, and the run has as many steps as fit.

    Args:
        command: as typed, for `env.json`.
        parallel: this process among those of the run; the only one unless given.

    Raises:
        ValueError: preflight refuses the run, the config asks for something impossible, or the run folder exists;
            nothing was written.
    """
    start_s, deadline = time.perf_counter(), None
    path = Path(config.run.folder) / config.run.name
    check_unused(path)
    report = examine(config, world_size=parallel.world_size if parallel else 1, thorough=False)
    report.raise_if_refused()
    if config.train.max_minutes is not None:
        parallel = parallel or one_process(config.run.device)
        if parallel.is_main:
            print(f"timing a few steps, to end within {config.train.max_minutes:g} minutes", flush=True)
        config, deadline = fit_to_budget(config, parallel, start_s)
    trainer = Trainer(config, parallel)
    trainer.start_s, trainer.deadline = start_s, deadline
    report = examine_corpus(report, trainer.corpus, trainer.tokenizer)
    report.raise_if_refused()
    folder, route = RunFolder(path), training_route(config, trainer.device)
    trainer.parallel.barrier()  # all ranks have looked before one makes the folder
    if trainer.parallel.is_main:
        lines = [describe(trainer), *(finding.line() for finding in report.findings)]
        print(printable("\n".join(lines)), flush=True)

    def begin() -> None:
        nonlocal folder
        folder = RunFolder.create(
            path,
            config_yaml=dump_config(config),
            env={
                **snapshot(trainer.device, command),
                "routing": None if route is None else route.as_dict(),
                "num_parameters": trainer.model.num_parameters(),
                "config": config.model_dump(mode="json"),
            },
            data_index=data_index(trainer),
            preflight=report.values(),
        )

    on_main(trainer.parallel, begin)
    return trainer, folder
