"""The names that the published experiment's scripts import, over this package's models."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from megalodon_enwik8.config import ExperimentConfig, make_config, model_of_key
from megalodon_enwik8.device import choose_device
from megalodon_enwik8.evaluation import reading
from megalodon_enwik8.generation import COLDEST
from megalodon_enwik8.models import byte_losses, count_parameters, draw_model


class _LanguageModel(nn.Module):
    """A model by the published constructor's arguments, the keys of its YAML files. Raises
    TypeError for another argument, UserError for a value that the key does not take."""

    kind: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]  # where the published constructor's are not the schema's

    def __init__(self, **options: Any) -> None:
        super().__init__()
        keys = {key for key in ExperimentConfig.model_fields if model_of_key(key) == self.kind}
        keys |= {"num_tokens", "rope_base", "attention_dropout", "gradient_checkpointing"}
        name = type(self).__name__
        if unknown := options.keys() - keys:
            raise TypeError(f"{name} takes no {min(unknown)}; it takes {', '.join(sorted(keys))}")
        values = {"model": self.kind, "run_dir": name, **self.defaults, **options}
        self.model = draw_model(make_config(values, name))
        self.config = self.model.config

    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor:
        """x (B, L) -> logits (B, L, V); or the mean loss of x[:, 1:] given what precedes, in
        nats."""
        if return_loss:
            return byte_losses(self.model, x).mean()
        logits: Tensor = self.model(input_ids=x, use_cache=False).logits
        return logits

    def generate(
        self, prompt: Tensor, max_length: int, temperature: float = 1.0, min_p: float = 0.1
    ) -> Tensor:
        """The `max_length` tokens (B, max_length) after a prompt (B, L), sampled. min_p is of the
        probabilities at this temperature; temperature 0 takes the likeliest."""
        with reading(self.model):
            text: Tensor = cast(Any, self.model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_length,
                do_sample=True,
                temperature=max(temperature, COLDEST),
                min_p=min_p,
                top_k=0,
                top_p=1.0,
            )
        return text[:, prompt.shape[1] :]


class MegalodonLM(_LanguageModel):
    kind = "megalodon"
    defaults: ClassVar = {"share_emb": False}

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(num_tokens=vocab_size, **options)


class Llama(_LanguageModel):
    kind = "llama"
    defaults: ClassVar = {"heads": 8, "llama_init": "pytorch"}


def get_optimal_device() -> tuple[torch.device, str, torch.dtype]:
    """The device that training uses, its type, and the type for autocast."""
    device = choose_device()
    return device, device.type, torch.bfloat16


def model_summary(model: nn.Module, max_depth: int = 4, show_param_shapes: bool = False) -> None:
    """Print how many parameters the model has and its parts down to `max_depth` levels have."""
    for name, module in model.named_modules():
        if name.count(".") + bool(name) < max_depth:
            shapes = [str(tuple(p.shape)) for p in module.parameters(recurse=False)]
            shown = f"  {', '.join(shapes)}" if show_param_shapes else ""
            print(f"{name or type(model).__name__:<40}{count_parameters(module):>14,}{shown}")
