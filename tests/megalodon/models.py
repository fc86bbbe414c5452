"""Small models with weights far from their initialisation, for tests."""

import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM

CHUNK = 8


# What these models have that the released ones, the library's defaults, lack.
OPTIONS = {"vocab_size": 256, "swiglu": True, "output_ffn_bias": True, "tie_word_embeddings": True}


def tiny_config(**options):
    sizes = {"model_dim": 32, "num_layers": 2, "num_heads": 2, "z_dim": 16, "value_dim": 24}
    sizes |= {"ffn_hidden_dim": 40, "cema_ndim": 4, "chunk_size": CHUNK, "norm_num_groups": 4}
    return MegalodonConfig(**{**OPTIONS, **sizes, **options})


def config_of_the_comparison(**options):
    """The Megalodon of 11.3M parameters that the experiment compares."""
    sizes = {"model_dim": 384, "num_layers": 6, "num_heads": 3, "z_dim": 192, "value_dim": 384}
    sizes |= {"ffn_hidden_dim": 1024, "cema_ndim": 8, "chunk_size": 256}
    return MegalodonConfig(**{**OPTIONS, **sizes, **options})


def tiny_model(**options):
    torch.manual_seed(0)
    model = MegalodonForCausalLM(tiny_config(**options)).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    """Give parameters that start at zero some weight, and CEMA a long memory."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.normal_(std=0.3)
        if name.endswith("cema.delta"):
            parameter.sub_(2.0)
