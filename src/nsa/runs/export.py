"""The model of a checkpoint alone, as a transformers folder: safetensors, `config.json` and the tokenizer.

export_model(Path("runs/NAME"), Path("model"))
AutoModelForCausalLM.from_pretrained("model")        # after `import nsa.hf`
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nsa.runs.checkpoints import (
    COMPLETE,
    RUN_CONFIG,
    STATE,
    TABLES,
    TRAINER,
    Listing,
    damage,
    inside,
    newest_checkpoint,
    random_file,
)

OF_TRAINING = (STATE, TABLES, TRAINER, RUN_CONFIG)


def export_model(source: Path, target: Path) -> Path:
    """Copy the model's files out of a checkpoint, each checked against its checksum.

    Args:
        source: a checkpoint, or a run folder, of which the newest whole one is taken.
        target: a folder that does not exist yet; it appears whole or not at all.

    Returns:
        The checkpoint that was taken.

    Raises:
        ValueError: there is no whole checkpoint, a file in it is damaged or lies outside of it, or the target exists.
    """
    checkpoint = source if (source / COMPLETE).is_file() else newest_checkpoint(source)
    if target.exists():
        raise ValueError(f"{target} exists already and is left as it is; give another folder")
    if problem := damage(checkpoint):
        raise ValueError(f"{checkpoint} cannot be exported: {problem}; take another checkpoint of the run")
    listing = Listing.read(checkpoint)
    random_files = {random_file(rank) for rank in range(listing.world_size)}
    names = [name for name in listing.files if Path(name).parts[0] not in OF_TRAINING and name not in random_files]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    for name in names:
        copy = inside(temporary, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(checkpoint, name), copy)
    os.replace(temporary, target)
    return checkpoint
