"""The Megalodon of the library, built from the YAML keys."""

from __future__ import annotations

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon_enwik8.ablations import ablate
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.fan_in import draw_by_fan_in


def build_megalodon(config: ExperimentConfig) -> MegalodonForCausalLM:
    """A freshly initialised Megalodon in float32; the caller seeds torch's generator."""
    model = MegalodonForCausalLM(
        MegalodonConfig(
            vocab_size=config.num_tokens,
            model_dim=config.model_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            z_dim=config.z_dim,
            value_dim=config.value_dim,
            ffn_hidden_dim=config.ffn_hidden_dim,
            cema_ndim=config.cema_ndim,
            chunk_size=config.chunk_size,
            norm_num_groups=config.norm_num_groups,
            rope_base=config.rope_base,
            swiglu=config.swiglu,
            rescale_nffn=config.rescale_nffn,
            scale_emb=config.scale_emb,
            tie_word_embeddings=config.share_emb,
            output_ffn_bias=config.output_ffn_bias,
            init_mode="he" if config.init_mode == "fan_in" else config.init_mode,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            hidden_dropout=config.hidden_dropout,
        )
    )
    if config.init_mode == "fan_in":
        draw_by_fan_in(model, config.num_layers, outputs=("wh1", "wh2", "w2"))
    ablate(model, config.ablation)
    return model
