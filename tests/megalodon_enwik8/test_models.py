"""Building and compiling either model."""

import importlib
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalodon.ops import chunk_attention
from megalodon_enwik8 import models
from megalodon_enwik8.config import load_config
from megalodon_enwik8.distributed import World
from megalodon_enwik8.evaluation import score_windows
from megalodon_enwik8.generation import generate_bytes
from megalodon_enwik8.models import (
    build_model,
    byte_losses,
    compile_layers,
    count_parameters,
    decoder_layers,
)
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import make_optimizer, train_step

# As published, less the rotary frequencies (depth x dim_head / 2) that were counted with them.
PARAMETERS = {
    "megalodon_multichunk_512": 11_376_000,
    "archive_megalodon_nano": 11_376_000,
    "archive_megalodon_small": 27_214_848,
    "llama_512": 12_489_792 - 6 * 32,
    "test": 557_728 - 2 * 16,
    "archive_nano": 8_950_848 - 6 * 32,
    "archive_simple": 35_800_064 - 16 * 32,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_files_build_the_models_that_they_build_there(name):
    config = load_config(Path(__file__).parent / "published" / f"{name}.yaml")
    with torch.device("meta"):
        assert count_parameters(build_model(config)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "parameters"), [("megalodon_multichunk_512", 11_277_696), ("llama_512", 12_489_600)]
)
def test_shipped_files_build_the_models_of_the_comparison(name, parameters):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        assert count_parameters(build_model(config)) == parameters


def test_weights_are_a_function_of_the_seed(make_tiny, model_name):
    first = build_model(make_tiny(model_name)).state_dict()
    torch.rand(3)  # whatever happened to the generator before
    again = build_model(make_tiny(model_name)).state_dict()
    other = build_model(make_tiny(model_name, seed=8)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_loss_is_that_of_the_next_byte(make_tiny, model_name):
    model = build_model(make_tiny(model_name)).eval()
    batch = torch.randint(256, (3, 21))
    with torch.no_grad():
        log_p = model(batch[:, :-1]).logits.log_softmax(-1)
        expected = -sum(log_p[b, t, batch[b, t + 1]] for b in range(3) for t in range(20))
        torch.testing.assert_close(byte_losses(model, batch).sum(), expected)


def test_llama_init_pytorch_keeps_embeddings_and_redraws_matrices(make_tiny):
    # PyTorch draws a matrix uniformly within 1/sqrt(fan_in), transformers from N(0, 0.02).
    for tied in (True, False):
        config = make_tiny("llama", tied_embedding=tied, llama_init="pytorch", dim=64, heads=4)
        model = build_model(config)
        embedding = model.get_input_embeddings().weight
        assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
        matrix = model.model.layers[0].mlp.gate_proj.weight
        assert matrix.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
        assert (model.get_output_embeddings().weight is embedding) == tied


def test_sizes_that_no_llama_has_are_one_line(make_tiny):
    with pytest.raises(UserError, match=r"^model=llama: .*not a multiple of the number"):
        build_model(make_tiny("llama", dim=17))


def test_a_llama_has_a_feed_forward_network_however_small_its_multiplier(make_tiny):
    llama = build_model(make_tiny("llama", ffn_dim_multiplier=0.01))
    assert llama.config.intermediate_size == 256


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_dim": 18}, "model_dim=18: must be a multiple of norm_num_groups=4"),
        ({"z_dim": 9, "num_heads": 1}, "z_dim=9: z_dim / num_heads must be even"),
        ({"value_dim": 5}, "value_dim=5: must be a multiple of num_heads=2"),
    ],
)
def test_sizes_that_no_megalodon_has_are_one_line(make_tiny, changes, line):
    with pytest.raises(UserError, match=f"^model=megalodon: {line}"):
        build_model(make_tiny("megalodon", **changes))


@pytest.mark.parametrize("tied", [True, False])
def test_fan_in_draws_either_model_alike(make_tiny, model_name, tied):
    wide = {
        "llama": {"llama_init": "fan_in", "dim": 64, "tied_embedding": tied},
        "megalodon": {"init_mode": "fan_in", "model_dim": 64, "share_emb": tied, "z_dim": 32},
    }[model_name]
    model = build_model(make_tiny(model_name, **wide))
    outputs = ("o_proj", "down_proj", "wh1", "wh2", "w2")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = module.in_features**-0.5 / (2 if name.endswith(outputs) else 1)  # 2 layers
            assert module.weight.std().item() == pytest.approx(expected, rel=0.15), name
            assert module.bias is None or not module.bias.any()
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(1 / 8, rel=0.1)


def test_flash_attn_changes_the_kernel_and_not_the_result(make_tiny):
    batch = torch.randint(256, (2, 20))
    fused, written_out = (build_model(make_tiny("llama", flash_attn=on)) for on in (True, False))
    assert written_out.config._attn_implementation == "eager"
    # Two orders of summation in float32.
    torch.testing.assert_close(fused(batch).logits, written_out(batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_name", "change"), [("megalodon", {}), ("llama", {}), ("llama", {"two_hop": True})]
)
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(make_tiny, model_name, change):
    batch = torch.randint(256, (2, 25))
    gradients, products = [], []
    for enabled in (False, True):
        model = build_model(
            make_tiny(model_name, gradient_checkpointing=enabled, attention_dropout=0.1, **change)
        ).train()
        torch.manual_seed(1)
        with FlopCounterMode(display=False) as counter:
            byte_losses(model, batch).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        products.append(counter.get_total_flops())
    assert products[1] > products[0]
    for plain, recomputed in zip(*gradients, strict=True):
        # The same operations in the same order.
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_compile_auto_says_what_it_chose_and_why(make_tiny, monkeypatch):
    config = make_tiny("llama", compile="auto")
    assert "too few" in compile_layers(build_model(config), config)
    monkeypatch.setattr(models, "COMPILE_PAYS_FLOPS", 0)
    model = build_model(config)
    names = list(model.state_dict())
    assert compile_layers(model, config).startswith("on (auto: ")
    assert list(model.state_dict()) == names
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install a C++ compiler" in compile_layers(model, config)


@pytest.mark.parametrize(
    ("own", "processes", "mode"),
    [
        ({"grad_accum_every": 1}, 1, "reduce-overhead"),
        ({"grad_accum_every": 1}, 2, None),
        ({"grad_accum_every": 2}, 1, None),
        ({"grad_accum_every": 1, "gradient_checkpointing": True}, 1, None),
    ],
)
def test_compile_auto_takes_graphs_on_a_gpu_where_a_step_allows(
    make_tiny, monkeypatch, own, processes, mode
):
    model = Mock(parameters=lambda: iter([Mock(device=torch.device("cuda"))]))
    layer = Mock()
    monkeypatch.setattr(models, "decoder_layers", lambda model: [layer])
    monkeypatch.setattr(models, "count_parameters", lambda model: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    said = compile_layers(model, make_tiny("llama", compile="auto", **own), processes)
    assert said == f"{'graphs' if mode else 'on'} (auto: it pays)"
    layer.compile.assert_called_once_with(dynamic=False, mode=mode)


def test_compile_true_without_a_compiler_is_refused(make_tiny, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    config = make_tiny("llama", compile=True)
    with pytest.raises(UserError, match=r"compile=true: install a C\+\+ compiler"):
        compile_layers(build_model(config), config)


def test_graphs_are_refused_where_there_are_none(make_tiny):
    config = make_tiny("llama", compile="graphs", grad_accum_every=1)
    with pytest.raises(
        UserError, match="compile=graphs: use another device, or set compile: false"
    ):
        compile_layers(build_model(config), config)
    world = World(torch.device("cpu"))
    world.size = 2
    with pytest.raises(UserError, match="compile=graphs: is for one process"):
        world.check(config)


def read_some(model):
    text = np.arange(60, dtype=np.uint8)
    score_windows(model, text, context=19, stride=19, use_autocast=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_train_as_layers_without_them(make_tiny, model_name):
    def losses(compile):
        config = make_tiny(model_name, compile=compile, batch_size=4, grad_accum_every=1)
        model = build_model(config).cuda().train()
        compile_layers(model, config)
        optimizer = make_optimizer(model, config)
        found = []
        for step in range(8):
            torch.manual_seed(step)
            batch = torch.randint(256, (4, config.seq_len + 1)).cuda()
            found.append(train_step(model, optimizer, batch, config)[0])
            if step % 3 == 2:  # in between, as a run does
                read_some(model)
                generate_bytes(model, b"some prompt", length=3, seed=1)
        return found

    assert losses("graphs") == pytest.approx(losses(False), abs=1e-4)


@pytest.mark.parametrize("ablation", ["none", "no_cema", "layer_norm", "one_hop+sharp_scores"])
def test_a_layer_is_one_graph_with_the_attention_that_a_gpu_takes(make_tiny, monkeypatch, ablation):
    monkeypatch.setattr(chunk_attention, "SCORES_LIMIT", 0)
    model = build_model(make_tiny("megalodon", ablation=ablation)).train()
    for layer in decoder_layers(model):
        layer.compile(dynamic=False, fullgraph=True, backend="eager")
    byte_losses(model, torch.randint(256, (2, 25))).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layers_compile_once_and_give_the_same_gradients(make_tiny, model_name, autocast):
    batch = torch.randint(256, (2, 25))
    model = None

    def gradients(config):
        nonlocal model
        model = build_model(config).train()
        compile_layers(model, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = byte_losses(model, batch).sum()
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    torch._dynamo.utils.counters.clear()
    compiled = gradients(make_tiny(model_name, compile=True))
    counters = torch._dynamo.utils.counters
    # Other shapes, and no gradients: served without compiling anew.
    read_some(model)
    generate_bytes(model, b"some prompt", length=3, seed=1)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    eager = gradients(make_tiny(model_name))
    for one, other in zip(compiled, eager, strict=True):
        # Fused kernels round less often: 2^-8 relative in bfloat16, of the largest entry.
        tolerance = (4e-2 if autocast else 1e-4) * other.abs().max().item() + 1e-6
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
