"""What transformers' `generate` must know of a Megalodon: its state is a cache of one kind and of
fixed size, and masks and positions speak of the text not yet read alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from .cache import MegalodonCache
from .compat import CACHE_NAME, one_cache
from .configuration_megalodon import MegalodonConfig


class MegalodonGenerationMixin(GenerationMixin):
    """transformers' own `generate`, with the cache, masks and positions of a Megalodon."""

    config: MegalodonConfig
    model: nn.Module

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own.

        Raises:
            ValueError: for prompts padded on the right, another kind of cache, and assistance
                with a cache that holds text.
        """

        def option(name: str) -> Any:
            places = (generation_config, self.generation_config)
            values = (kwargs.get(name), *(getattr(place, name, None) for place in places))
            return next((value for value in values if value is not None), None)

        if kind := option("cache_implementation"):
            raise ValueError(
                f"cache_implementation={kind!r}: a Megalodon has one kind of cache, fixed in "
                "size already; leave it unset"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError(
                "attention_mask ends in padding, where there is no token to go on from: pad "
                "prompts on the left (tokenizer.padding_side = 'left')"
            )
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        use_cache = option("use_cache") is not False or kwargs.get("inputs_embeds") is not None
        if cache is None and use_cache:
            cache = MegalodonCache(self.config)
            if option("is_assistant"):
                cache.activate_past_recording()
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if not isinstance(cache, MegalodonCache):  # none, or one that forward will refuse
            return super().generate(inputs, generation_config, *args, **kwargs)
        helps = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        if cache.positions and any(map(option, helps)):
            raise ValueError(
                "assisted generation reads the whole text, but the cache holds "
                f"{cache.positions} positions already: begin with a new cache"
            )
        recorded = cache.is_croppable
        output = super().generate(inputs, generation_config, *args, **kwargs)
        if cache.is_croppable and not recorded:
            cache.read_again(self.model.forward)
            cache.stop_recording()
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it hands out pages of keys and values."""
        raise ValueError(
            "continuous batching (generate_batch) pages keys and values, of which a Megalodon "
            "keeps one chunk: use generate"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, without the tokenizer of `stop_strings`, which it would hand on, and
        without the mask and the positions of further tokens, which grow with the text: the cache
        holds what they say."""
        kwargs.pop("tokenizer", None)
        cache = kwargs.get(CACHE_NAME)
        further = next_sequence_length is not None and not is_first_iteration
        if further and cache is not None and cache.positions:
            kwargs |= {"attention_mask": None, "position_ids": None}
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
