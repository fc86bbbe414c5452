"""The names that the published scripts import, used as they use them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megalodon_enwik8 import Llama, MegalodonLM, get_optimal_device, model_summary
from megalodon_enwik8.config import make_config
from megalodon_enwik8.models import build_model, byte_losses, count_parameters
from megalodon_enwik8.safety import UserError

from .conftest import TINY

# The arguments that train.py and inference.py give, from the YAML file's keys.
ARGUMENTS = {
    "llama": {
        "num_tokens", "dim", "depth", "heads", "dim_head", "tied_embedding", "ffn_dim_multiplier",
        "flash_attn",
    },
    "megalodon": {
        "vocab_size", "model_dim", "num_layers", "num_heads", "z_dim", "value_dim",
        "ffn_hidden_dim", "cema_ndim", "chunk_size", "norm_num_groups", "dropout",
        "attention_dropout", "hidden_dropout", "swiglu", "rescale_nffn", "scale_emb", "share_emb",
        "rope_base", "init_mode", "gradient_checkpointing",
    },
}  # fmt: skip
CLASSES = {"llama": Llama, "megalodon": MegalodonLM}


def made(model_name, **options):
    vocabulary = {"llama": "num_tokens", "megalodon": "vocab_size"}[model_name]
    return CLASSES[model_name](**{vocabulary: 256, **TINY[model_name], **options})


@pytest.mark.parametrize(
    ("name", "parameters"), [("megalodon_multichunk_512", 11_376_000), ("llama_512", 12_489_600)]
)
def test_the_published_files_arguments_make_the_models_of_the_comparison(name, parameters):
    text = (Path(__file__).parent / "published" / f"{name}.yaml").read_text()
    values = {**yaml.safe_load(text), "vocab_size": 256}
    model_name = values.get("model", "llama")
    with torch.device("meta"):
        model = CLASSES[model_name](**{key: values[key] for key in ARGUMENTS[model_name]})
    assert count_parameters(model) == parameters


def test_loss_and_logits_are_ours(model_name):
    torch.manual_seed(7)
    model = made(model_name)
    theirs = {"llama": {"llama_init": "pytorch"}, "megalodon": {"share_emb": False}}[model_name]
    values = {"model": model_name, "run_dir": "x", **TINY[model_name], **theirs}
    ours = build_model(make_config(values, "test"))
    x = torch.randint(256, (3, 25))
    assert torch.equal(model(x, return_loss=True), byte_losses(ours, x).mean())
    assert torch.equal(model(x, return_loss=False), ours(x).logits)
    model(x, return_loss=True).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_come_from_the_generator_as_it_stands(model_name):
    first, second = made(model_name), made(model_name)
    assert any(
        not torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True)
    )
    second.load_state_dict(first.state_dict())
    x = torch.randint(256, (1, 9))
    assert torch.equal(first(x), second(x))


def test_generate_returns_the_continuation_alone(model_name):
    model = made(model_name).train()
    prompt = torch.randint(256, (2, 11))
    torch.manual_seed(1)
    sampled = model.generate(prompt, max_length=6, temperature=0.9, min_p=0.1)
    assert sampled.shape == (2, 6)
    assert model.training
    likeliest = model.generate(prompt, 6, temperature=0.0)
    for t in range(6):
        text = torch.cat([prompt, likeliest[:, :t]], dim=1)
        assert torch.equal(model.eval()(text)[:, -1].argmax(-1), likeliest[:, t])
    assert torch.equal(model.generate(prompt, 6, temperature=1.0, min_p=1.0), likeliest)


def test_gradient_checkpointing_is_the_constructors():
    for wanted in (False, True):
        layers = made("megalodon", gradient_checkpointing=wanted).model.model.layers
        assert all(layer.gradient_checkpointing is wanted for layer in layers)


def test_other_arguments_are_refused(model_name):
    for name in ("learning_rate", "filter_thres", "max_seq_len"):
        with pytest.raises(TypeError, match=f"takes no {name}; it takes "):
            made(model_name, **{name: 1})
    with pytest.raises(UserError, match=r"^(MegalodonLM|Llama): attention_dropout=2"):
        made(model_name, attention_dropout=2.0)


def test_the_summary_counts_the_parameters(model_name, capsys):
    model = made(model_name)
    model_summary(model, max_depth=1)
    assert capsys.readouterr().out.split() == [
        type(model).__name__,
        f"{count_parameters(model):,}",
    ]
    model_summary(model, max_depth=4, show_param_shapes=True)
    shown = capsys.readouterr().out
    assert "model.model.layers" in shown
    assert "model.model.layers.0" not in shown
    assert "(256, 16)" in shown


def test_the_device_is_that_of_training():
    assert get_optimal_device() == (torch.device("cpu"), "cpu", torch.bfloat16)


def test_the_package_itself_is_imported_without_torch():
    code = "import sys, megalodon_enwik8; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(ImportError, match="cannot import name 'Lama'"):
        from megalodon_enwik8 import Lama  # noqa: F401
