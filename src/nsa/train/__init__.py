"""The trainer: from a YAML config to a run folder.

Reading order: `run.py` (the main path), `trainer.py` (one optimizer step), `budget.py` (steps that fit into minutes);
`config.py` (every key) and `load_config.py`; `parallel.py` (the processes of a run) and `device.py`; `model.py`,
`activation.py` (what backward computes again), `optim.py`, `guards.py`, `flops.py` (MFU); `run_folder.py`,
`run_files.py` and `run_lock.py` (what lies where, no links, and one writer); `stop.py` and `halt.py`; `checkpoint.py`
(the folders), `checkpoint_save.py`, `checkpoint_load.py`, `checkpoint_read.py` (files of strangers),
`checkpoint_random.py`, `checkpoint_export.py`; `resume.py`, `resume_config.py` and `restore.py`. `observe/` is what a
run tells of itself; `preflight/`, `estimate.py` and `doctor.py` look before it starts. What a user types and writes:
`options.py` (command lines), `yaml_file.py`, `packaged_configs.py`, `device_name.py`, `resume_keys.py`. The guides are
docs/training.md, checkpoints.md, operations.md and before_a_run.md.
"""
