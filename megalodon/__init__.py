"""Megalodon: efficient language modelling with unlimited context, for Hugging Face transformers.

``import megalodon`` makes the model and its byte tokenizer known to AutoConfig, AutoModel,
AutoModelForCausalLM, AutoTokenizer and pipelines.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache import MegalodonCache
from .configuration_megalodon import MegalodonConfig
from .modeling_megalodon import MegalodonForCausalLM, MegalodonModel
from .tokenization_megalodon import MegalodonTokenizer

AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
AutoTokenizer.register(MegalodonConfig, MegalodonTokenizer, exist_ok=True)
# By this list of names the text-generation pipeline knows what it supports, and Trainer whose
# labels are shifted when it smooths them; register() does not reach it.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megalodon"] = "MegalodonForCausalLM"

__all__ = [
    "MegalodonCache",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
    "MegalodonTokenizer",
]
