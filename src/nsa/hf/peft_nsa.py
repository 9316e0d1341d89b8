"""Adapters of the package peft for NSA models; peft is imported only when this is called.

from nsa.hf import register_with_peft
register_with_peft()
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
"""

from __future__ import annotations

from .configuration_nsa import NSAConfig


def register_with_peft() -> None:
    """Let LoRA, IA3 and their kin find their `target_modules` in an NSA model: they are those of Llama.

    Without it name them (`target_modules=["q_proj", "v_proj"]`) or give "all-linear", as for any model that peft does
    not know. Prompt and prefix tuning need neither.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import utils

    for name, table in vars(utils).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault(NSAConfig.model_type, table["llama"])
