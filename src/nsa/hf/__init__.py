"""The transformers model. Importing this registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.

>>> from nsa.hf import NSAConfig, NSAForCausalLM
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("runs/showcase/checkpoints/latest")
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_nsa import NSACacheLayer
from .configuration_nsa import NSAConfig
from .modeling_nsa import NSAForCausalLM, NSAModel, NSAPreTrainedModel

__all__ = ["NSACacheLayer", "NSAConfig", "NSAForCausalLM", "NSAModel", "NSAPreTrainedModel"]

AutoConfig.register("nsa", NSAConfig)
AutoModel.register(NSAConfig, NSAModel)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM)
