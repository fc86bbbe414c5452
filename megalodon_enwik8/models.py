"""Either model from a config, and what training, evaluation and sampling need to know of it."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from megalodon import MegalodonCache, MegalodonConfig, MegalodonForCausalLM
from megalodon.layout import Layout
from megalodon.modeling_megalodon import MegalodonBlock
from megalodon.modules import MegalodonLayerNorm
from megalodon.ops.timestep_norm import TimestepNormState, initial_state
from megalodon_enwik8.checkpoint import Checkpoint
from megalodon_enwik8.config import ExperimentConfig, model_of_key
from megalodon_enwik8.safety import UserError

# Compiling one block takes some 20 seconds on two CPU cores and then saves about a tenth of each
# step; it pays from about 200 steps of the protocol on, which are this much arithmetic.
COMPILE_PAYS_FLOPS = 1e14


def build_model(config: ExperimentConfig, device: torch.device | None = None) -> PreTrainedModel:
    """The config's model in float32, drawn on the CPU, a pure function of the seed. Raises
    UserError for sizes that no such model can have."""
    torch.manual_seed(config.seed)
    model = draw_model(config)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model


def draw_model(config: ExperimentConfig) -> PreTrainedModel:
    """Likewise, its weights drawn from torch's generator as it stands."""
    try:
        build = build_llama if config.model == "llama" else build_megalodon
        return build(config)
    except (ValueError, StrictDataclassError) as error:  # which wraps what a config's check says
        raise UserError(f"model={config.model}: {error.__cause__ or error}") from error


def build_megalodon(config: ExperimentConfig) -> PreTrainedModel:
    """The library's Megalodon: its own keys have their names there."""
    keys = [key for key in type(config).model_fields if model_of_key(key) == "megalodon"]
    values: dict[str, Any] = {key: getattr(config, key) for key in keys if key != "ablation"}
    if config.init_mode == "fan_in":
        values["init_mode"] = "he"
    model = MegalodonForCausalLM(
        MegalodonConfig(
            vocab_size=config.num_tokens,
            rope_base=config.rope_base,
            attention_dropout=config.attention_dropout,
            gradient_checkpointing=config.gradient_checkpointing,
            **values,
        )
    )
    if config.init_mode == "fan_in":
        draw_by_fan_in(model, config.num_layers, outputs=("wh1", "wh2", "w2"))
    ablate(model, config.ablation.split("+"))
    return model


def build_llama(config: ExperimentConfig) -> PreTrainedModel:
    """The baseline: transformers' own LlamaForCausalLM."""
    scale = 8 / 3 if config.ffn_dim_multiplier is None else config.ffn_dim_multiplier
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.num_tokens,
            hidden_size=config.dim,
            intermediate_size=256 * max(1, math.ceil(int(scale * config.dim) / 256)),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            head_dim=config.dim_head,
            # The rotary embedding needs no table: the length only bounds what generate accepts.
            max_position_embeddings=2**30,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            attention_dropout=config.attention_dropout,
            gradient_checkpointing=config.gradient_checkpointing,
            tie_word_embeddings=config.tied_embedding,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa" if config.flash_attn else "eager",  # type: ignore[call-arg]
        )
    )
    if config.llama_init == "fan_in":
        draw_by_fan_in(model, config.depth, outputs=("o_proj", "down_proj"))
    elif config.llama_init == "pytorch":  # as published: embeddings stay as transformers has them
        for module in model.modules():
            tied = config.tied_embedding and module is model.lm_head
            if isinstance(module, nn.Linear) and not tied:
                module.reset_parameters()
    if config.two_hop:
        for layer in decoder_layers(model):
            layer.__class__ = TwoHopLayer
    return model


def draw_by_fan_in(model: nn.Module, layers: int, outputs: tuple[str, ...]) -> None:
    """Draw every matrix anew from N(0, 1 / fan_in), in place, and the embedding as if it were the
    output matrix. Those of a layer's projections whose names end in `outputs`, onto the residual
    stream, get that divided by sqrt(2 layers), as in GPT-2 (Radford et al. 2019, section 2.3).
    Biases stay as they are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            depth = 2 * layers if name.endswith(outputs) else 1
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features * depth))


def ablate(model: MegalodonForCausalLM, ablations: Sequence[str]) -> None:
    """Change the model as `ablation` says, in place.

    `sharp_scores`: queries and keys start so long that scores are cosines times sqrt(d), for heads
    of size d, as a Transformer's with normalised queries and keys (Henry et al. 2020, arXiv
    2010.04245, section 3). A Megalodon's start as cosines, over which a softmax is nearly a mean.
    """
    config = model.config
    layers: list[Any] = decoder_layers(model)
    for layer in layers:
        if "no_cema" in ablations:
            layer.cema = NoCEMA(config)
        if "layer_norm" in ablations:
            layer.timestep_norm = LayerNormInstead(config)
        if "one_hop" in ablations:
            layer.__class__ = OneHopBlock
        if "sharp_scores" in ablations:
            head_dim = config.z_dim // config.num_heads
            nn.init.constant_(layer.query_key.gamma, head_dim**0.25 - 1)  # stored minus one
    if "layer_norm" in ablations:
        model.model.final_norm = LayerNormInstead(config)


class NoCEMA(nn.Module):
    """`no_cema`: in the place of a MegalodonCEMA, hands its input on."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.order = config.cema_ndim

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if state is None and layout.return_state:
            state = x.new_zeros(x.shape[0], x.shape[2], self.order, 2, dtype=torch.float32)
        return x, state


class LayerNormInstead(MegalodonLayerNorm):
    """`layer_norm`: in the place of a MegalodonTimestepNorm, with parameters of the same shapes,
    normalises over the channels of one step alone. Its state only counts."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.num_groups = config.norm_num_groups

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, state: TimestepNormState | None, layout: Layout
    ) -> tuple[torch.Tensor, TimestepNormState]:
        state = initial_state(x, self.num_groups) if state is None else state
        if layout.segments is None:
            steps = state.steps + x.shape[1]
        else:
            steps = layout.segments.final_count(state.steps)
        return super().forward(x), state._replace(steps=steps)


class OneHopBlock(MegalodonBlock):
    """`one_hop`: what the first hop brings stays in the stream, as what a Transformer's attention
    brings does; a Megalodon's gets there through the feed-forward network alone."""

    def second_hop(
        self, x: torch.Tensor, y: torch.Tensor, hidden: float, branch: float
    ) -> torch.Tensor:
        return super().second_hop(y, y, hidden, branch)


class TwoHopLayer(LlamaDecoderLayer):
    """`two_hop: true`: what attention brings gets into the stream through the feed-forward network
    alone, as a Megalodon's does."""

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        x = hidden_states
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **given)
        made: torch.Tensor = self.mlp(self.post_attention_layernorm(x + attended))
        return x + made


def restore_model(checkpoint: Checkpoint, device: torch.device | None = None) -> PreTrainedModel:
    """The model that a checkpoint holds, in evaluation mode."""
    model = build_model(checkpoint.config, device)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raises UserError when the weights are not those of the checkpoint's own config."""
    try:
        model.load_state_dict(checkpoint.model_state)
    except (RuntimeError, AttributeError, TypeError) as error:  # some may be no tensors
        raise UserError(
            f"{checkpoint.path}: its weights do not fit its own config: {error}"
        ) from error


def keeps_a_state(model: PreTrainedModel) -> bool:
    """Whether what the model keeps of a text is of fixed size."""
    return model.config.model_type == "megalodon"


def new_state(model: PreTrainedModel) -> MegalodonCache:
    """An empty state for a Megalodon. Raises UserError for a model without one."""
    if not keeps_a_state(model):
        raise UserError(
            "a Llama has no state of fixed size to carry: its memory of a text grows with every "
            "byte; give it windows of the text, as --context N does"
        )
    return MegalodonCache(cast(MegalodonConfig, model.config))


def byte_losses(
    model: nn.Module, batch: torch.Tensor, state: MegalodonCache | None = None
) -> torch.Tensor:
    """Cross-entropy of each byte of batch[:, 1:] given what precedes, in nats: float32 (B, L).

    batch: (B, L + 1) int64. state: what came before it, then brought up to date.
    """
    input_ids, targets = batch[:, :-1], batch[:, 1:]
    carried = {} if state is None else {"cache": state}
    logits = model(input_ids=input_ids, use_cache=state is not None, **carried).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def count_parameters(module: nn.Module) -> int:
    """Shared tensors count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def compile_layers(model: PreTrainedModel, config: ExperimentConfig, processes: int = 1) -> str:
    """Compile each decoder layer in place if the config asks for it or `auto` finds it worthwhile,
    on an NVIDIA GPU as CUDA graphs where a step allows it.

    The layers share their code, so that one compilation serves all; parameter names, and with
    them checkpoints, stay as they are. Returns what was chosen and why.
    Raises UserError where compilation is asked for and cannot work.
    """
    device = next(model.parameters()).device
    wanted, why, graphs = config.compile, "as configured", config.compile == "graphs"
    if wanted == "auto":
        flops = 6.0 * count_parameters(model) * config.tokens_per_step * config.num_batches
        pays = device.type == "cuda" or flops >= COMPILE_PAYS_FLOPS
        graphs = device.type == "cuda" and processes == 1 and config.is_replayable
        lacking = _lacking_for_compile(device, graphs)
        wanted = pays and not lacking
        why = f"auto: {lacking or ('it pays' if pays else 'too few steps')}"
    elif wanted and (lacking := _lacking_for_compile(device, graphs)):
        raise UserError(f"compile={str(wanted).lower()}: {lacking}, or set compile: false")
    if wanted:
        for layer in decoder_layers(model):
            layer.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
    return f"{'off' if not wanted else 'graphs' if graphs else 'on'} ({why})"


def _lacking_for_compile(device: torch.device, graphs: bool) -> str | None:
    """What torch.compile lacks on this device, as an instruction."""
    if device.type == "mps" or (graphs and device.type != "cuda"):
        return "use another device"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "install triton"
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    found = any(name and shutil.which(name) for name in compilers)
    return None if found else "install a C++ compiler"
