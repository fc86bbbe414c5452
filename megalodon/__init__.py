"""Megalodon: efficient language modelling with unlimited context, for Hugging Face transformers.

``import megalodon`` makes the model and its byte tokenizer known to AutoConfig, AutoModel,
AutoModelForCausalLM, AutoTokenizer and pipelines.
"""

# ruff: noqa: E402
from .versions import __version__, warn_of_untested_versions

warn_of_untested_versions()  # before imports that another version may not have
# isort: split

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .cache import MegalodonCache
from .compat import make_known_as_causal_lm
from .configuration_megalodon import MegalodonConfig
from .modeling_megalodon import MegalodonForCausalLM, MegalodonModel
from .ops.precision import configure_precision
from .tokenization_megalodon import MegalodonTokenizer

AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
AutoTokenizer.register(MegalodonConfig, MegalodonTokenizer, exist_ok=True)
make_known_as_causal_lm()

__all__ = [
    "MegalodonCache",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
    "MegalodonTokenizer",
    "__version__",
    "configure_precision",
]
