"""What transformers' `generate` must know of a Megalodon: its state is a cache of one kind and of
fixed size, and masks and positions speak of the text not yet read alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .cache import MegalodonCache
from .configuration_megalodon import MegalodonConfig
from .layout import document_positions


class MegalodonGenerationMixin(GenerationMixin):
    """transformers' own `generate`, with the cache, masks and positions of a Megalodon."""

    config: MegalodonConfig

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.LongTensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, without the tokenizer of `stop_strings`, which it would hand on."""
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError(
                "attention_mask ends in padding, where there is no token to go on from: pad "
                "prompts on the left (tokenizer.padding_side = 'left')"
            )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """transformers' own, or what segment_ids say: those it would neither cut nor extend."""
        segment_ids = model_kwargs.pop("segment_ids", None)
        if segment_ids is None:
            positions: Tensor = super()._prepare_position_ids_for_generation(
                inputs_tensor, model_kwargs
            )
            return positions
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        return document_positions(segment_ids, mask, cache, *inputs_tensor.shape[:2])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, without the mask and the positions once a cache holds what they say
        of the past: they would grow by a column with every token."""
        if outputs.past_key_values is not None:
            model_kwargs.pop("attention_mask", None)
            model_kwargs.pop("position_ids", None)
            model_kwargs.pop("segment_ids", None)
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        return updated

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a Megalodon "
                "has one kind of cache, fixed in size already; leave it unset"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True  # generate leaves such a cache at its last token
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = MegalodonCache(self.config)
