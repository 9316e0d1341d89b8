"""How a run begins and is resumed: the one place that knows both preflight and the trainer.

Reading order: `start.py`, `budget.py` (parts timed, steps fitted into minutes), `resume.py` and `resume_config.py`,
`environment.py` (what it runs on).
"""
