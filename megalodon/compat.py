"""What differs between the versions of transformers that are served, and what of it is private.

From 5.24 on transformers calls `cache` what it called `past_key_values` before, in the arguments
of every model and in its outputs. Here both names are read everywhere, and ours to transformers
is the one that it has.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from .cache import MegalodonCache

_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"

if TYPE_CHECKING or CACHE_NAME == "cache":
    ModelOutput = BaseModelOutputWithPast
    CausalLMOutput = CausalLMOutputWithPast
else:

    class ModelOutput(BaseModelOutputWithPast):
        """transformers' own, with the new name of its cache beside the old one."""

        cache = property(lambda self: self.past_key_values)

    class CausalLMOutput(CausalLMOutputWithPast):
        """transformers' own, with the new name of its cache beside the old one."""

        cache = property(lambda self: self.past_key_values)


def one_cache(
    cache: "MegalodonCache | None", past_key_values: "MegalodonCache | None"
) -> "MegalodonCache | None":
    """The cache of a call, under whichever name it came. Raises ValueError for two of them."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one thing: give one of them")
    return past_key_values if cache is None else cache


def make_known_as_causal_lm() -> None:
    """Write Megalodon into the list by which the text-generation pipeline knows what it supports,
    and Trainer whose labels to shift when it smooths them. AutoModelForCausalLM.register, the
    public way, does not reach it."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megalodon"] = "MegalodonForCausalLM"
