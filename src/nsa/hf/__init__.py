"""The transformers model. Importing this registers it and its heads with `AutoConfig`, `AutoModel` and the other auto
classes.

Reading order: `configuration_nsa.py`, `modeling_nsa.py` (the model), `dense_nsa.py` (its dense and sliding layers),
`rows_nsa.py` (rows without their padding), `cache_nsa.py` (what `generate` keeps), `heads_nsa.py` (sequences, tokens,
answers), `peft_nsa.py`.

>>> from nsa.hf import NSAConfig, NSAForCausalLM
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("runs/showcase/checkpoints/latest")
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_nsa import NSACacheLayer
from .configuration_nsa import NSAConfig
from .heads_nsa import NSAForQuestionAnswering, NSAForSequenceClassification, NSAForTokenClassification
from .modeling_nsa import NSAForCausalLM, NSAModel, NSAPreTrainedModel
from .peft_nsa import register_with_peft

__all__ = [
    "NSACacheLayer",
    "NSAConfig",
    "NSAForCausalLM",
    "NSAForQuestionAnswering",
    "NSAForSequenceClassification",
    "NSAForTokenClassification",
    "NSAModel",
    "NSAPreTrainedModel",
    "register_with_peft",
]

AutoConfig.register("nsa", NSAConfig)
AutoModel.register(NSAConfig, NSAModel)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM)
AutoModelForSequenceClassification.register(NSAConfig, NSAForSequenceClassification)
AutoModelForTokenClassification.register(NSAConfig, NSAForTokenClassification)
AutoModelForQuestionAnswering.register(NSAConfig, NSAForQuestionAnswering)
