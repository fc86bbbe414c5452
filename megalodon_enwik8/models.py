"""What training, evaluation and sampling need to know of a model, and nothing about which it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon import MegalodonCache, MegalodonConfig
from megalodon_enwik8.checkpoint import Checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.llama import build_llama
from megalodon_enwik8.loss import cross_entropy
from megalodon_enwik8.megalodon import build_megalodon

# Compiling one block takes about half a minute on two CPU cores and then saves about a quarter of
# each step; it pays from about 200 steps of the protocol on, which are this much arithmetic.
COMPILE_PAYS_FLOPS = 1e14


def build_model(config: ExperimentConfig) -> PreTrainedModel:
    """The config's model, float32 on the CPU, its weights a pure function of the seed."""
    torch.manual_seed(config.seed)
    if config.model == "llama":
        model: PreTrainedModel = build_llama(config)
    else:
        model = build_megalodon(config)
    if config.gradient_checkpointing:
        # Early releases of transformers 5 know it by its old name alone.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return model


def restore_model(checkpoint: Checkpoint, path: str | Path) -> PreTrainedModel:
    """The model that a checkpoint read from `path` holds, on the CPU, in evaluation mode."""
    config = checkpoint.experiment(path)
    with torch.device("meta"):
        # No memory is taken for sizes that a stranger's file claims and does not hold.
        _check_weights(build_model(config), checkpoint, path)
    model = build_model(config)
    load_weights(model, checkpoint, path)
    return model.eval()


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint, path: str | Path) -> None:
    """Raises UserError when the weights are not those of the checkpoint's own config."""
    _check_weights(model, checkpoint, path)
    model.load_state_dict(checkpoint.model_state)


def _check_weights(model: PreTrainedModel, checkpoint: Checkpoint, path: str | Path) -> None:
    def kind(tensor: object) -> str:
        if not isinstance(tensor, torch.Tensor):
            return "absent"
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    wanted, held = model.state_dict(), checkpoint.model_state
    for name in [*wanted, *held]:
        if kind(held.get(name)) != kind(wanted.get(name)):
            raise UserError(
                f"{path}: its weights do not fit its own config: {name} is "
                f"{kind(held.get(name))}, expected {kind(wanted.get(name))}"
            )


def new_state(model: PreTrainedModel, *, truncated: bool = False) -> MegalodonCache:
    """An empty state for a Megalodon; truncated: no gradient flows from one call to the one before.
    Raises UserError for a model without one."""
    if not keeps_a_state(model):
        raise UserError(
            f"a {type(model).__name__} has no state of fixed size to carry: its memory of the text "
            "grows with every byte; give it windows of the text"
        )
    return MegalodonCache(cast(MegalodonConfig, model.config), truncated=truncated)


def keeps_a_state(model: PreTrainedModel) -> bool:
    """Whether what the model keeps of a text is of fixed size."""
    return model.config.model_type == "megalodon"


def summed_loss(
    model: PreTrainedModel, rows: torch.Tensor, state: MegalodonCache | None = None
) -> torch.Tensor:
    """Cross-entropy of rows[:, 1:] given what precedes, in nats, summed over bytes: float32 ().

    rows: (B, L + 1) int64. state: what came before rows, then brought up to date.
    """
    return byte_losses(model, rows, state).sum()


def byte_losses(
    model: PreTrainedModel, rows: torch.Tensor, state: MegalodonCache | None = None
) -> torch.Tensor:
    """As :func:`summed_loss`, of each byte: float32 (B, L)."""
    carried = {} if state is None else {"cache": state}
    output = model(input_ids=rows[:, :-1], use_cache=state is not None, **carried)
    losses = cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
    return losses.view(rows.shape[0], -1)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def count_parameters(module: torch.nn.Module) -> int:
    """Shared tensors count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def compile_layers(model: PreTrainedModel, config: ExperimentConfig, steps: int) -> str:
    """Compile each decoder layer in place if the config asks for it or `auto` finds it worthwhile.

    The layers share their code, so that one compilation serves all; parameter names, and with
    them checkpoints, stay as they are. Returns what was chosen and why.
    Raises UserError where compilation is asked for and cannot work.
    """
    device = next(model.parameters()).device
    missing = _missing_for_compile(device) or _unfit_for_compile(config)
    if config.compile is True and missing:
        raise UserError(f"compile=true: {missing}; or set compile: false")
    if config.compile == "auto":
        flops = 6.0 * count_parameters(model) * config.tokens_per_step * steps
        if missing:
            wanted, why = False, f"auto: {missing}"
        elif device.type == "cuda":
            wanted, why = True, "auto: a CUDA device"
        elif flops >= COMPILE_PAYS_FLOPS:
            wanted, why = True, f"auto: {steps} steps are enough to earn back the time it takes"
        else:
            wanted, why = False, f"auto: {steps} steps of this size are too few to earn it back"
    else:
        wanted, why = config.compile, "as configured"
    if wanted:
        for layer in decoder_layers(model):
            layer.compile(dynamic=False)
    return f"{'on' if wanted else 'off'} ({why})"


def _unfit_for_compile(config: ExperimentConfig) -> str | None:
    """Why compiled layers would not serve this run, as an instruction."""
    if config.model == "megalodon" and config.carry_state and config.seq_len % config.chunk_size:
        return (
            f"carry_state begins each step elsewhere in a chunk, for each of which all would be "
            f"compiled anew: make seq_len={config.seq_len} a multiple of "
            f"chunk_size={config.chunk_size}"
        )
    return None


def _missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile lacks on this device, as an instruction."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "install triton"
    if device.type == "cpu":
        compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
        found = any(name and shutil.which(name) for name in compilers)
        return None if found else "install a C++ compiler (g++ or clang++)"
    return f"torch.compile is not used on {device.type}"
