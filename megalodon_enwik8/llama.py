"""The baseline: transformers' own LlamaForCausalLM, built from the YAML keys."""

from __future__ import annotations

import math

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.fan_in import draw_by_fan_in

FFN_MULTIPLE = 256


def ffn_width(dim: int, multiplier: float | None) -> int:
    """multiplier * dim, or 8/3 of dim, rounded up to a multiple of 256 (2.67 of 384 gives 1280)."""
    width = int(8 * dim / 3) if multiplier is None else int(multiplier * dim)
    return FFN_MULTIPLE * math.ceil(width / FFN_MULTIPLE)


def build_llama(config: ExperimentConfig) -> LlamaForCausalLM:
    """A freshly initialised Llama in float32; the caller seeds torch's generator."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.num_tokens,
            hidden_size=config.dim,
            intermediate_size=ffn_width(config.dim, config.ffn_dim_multiplier),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            head_dim=config.dim_head,
            # The rotary embedding needs no table: the length only bounds what generate accepts.
            max_position_embeddings=2**30,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            attention_dropout=config.attention_dropout,
            tie_word_embeddings=config.tied_embedding,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa" if config.flash_attn else "eager",  # type: ignore[call-arg]
        )
    )
    if config.llama_init == "fan_in":
        draw_by_fan_in(model, config.depth, outputs=("o_proj", "down_proj"))
    elif config.llama_init == "pytorch":
        # The published experiment: PyTorch's defaults, embeddings as transformers has them.
        for module in model.modules():
            if isinstance(module, nn.Linear) and not (
                config.tied_embedding and module is model.lm_head
            ):
                module.reset_parameters()
    return model
