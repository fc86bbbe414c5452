"""Megalodon: efficient language modelling with unlimited context, for Hugging Face transformers.

``import megalodon`` makes the model known to AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import MegalodonCache
from .configuration_megalodon import MegalodonConfig
from .modeling_megalodon import MegalodonForCausalLM, MegalodonModel

AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)

__all__ = ["MegalodonCache", "MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel"]
