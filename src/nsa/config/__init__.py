"""What a user types and writes: YAML and options become one checked `RunConfig`. Nothing here imports torch.

Reading order: `run.py` (every key), `load.py` (YAML and overrides to a config and back), `options.py` (command lines),
`yaml_file.py`, `packaged.py` (the configs that come with the package), `findings.py` (what preflight can find, by
name), `device_name.py`, `resume_keys.py` (what a resumed run may change).
"""
