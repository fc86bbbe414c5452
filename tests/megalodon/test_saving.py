"""save_pretrained and from_pretrained: the same model again, and the precision it needs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megalodon import MegalodonConfig, MegalodonForCausalLM, MegalodonModel

from .models import CHUNK, tiny_config, tiny_model

quiet = pytest.mark.usefixtures("no_warnings")

SENSITIVE = ("timestep_norm", "cema", "rms_norm", "query_key", "ffn_norm", "final_norm")
IDS = torch.randint(0, 256, (2, 2 * CHUNK + 1), generator=torch.Generator().manual_seed(0))


def files_of(folder):
    """Every tensor in the folder's safetensors files."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def is_sensitive(name):
    return any(part in name for part in SENSITIVE)


@quiet
@torch.no_grad()
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied, dtype, sharded):
    model = tiny_model(tie_word_embeddings=tied, rescale_nffn=True).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is sharded
    saved = files_of(tmp_path)
    assert ("lm_head.weight" in saved) is not tied
    for name, tensor in saved.items():
        assert tensor.dtype == (torch.float32 if is_sensitive(name) else dtype), name
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(again) is MegalodonForCausalLM
    assert again.dtype == dtype
    assert not again.training
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    logits = again(IDS).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert torch.equal(logits, model(IDS).logits)


@quiet
@torch.no_grad()
def test_loading_in_bfloat16_leaves_sensitive_parameters_as_they_are(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in short.state_dict().items():
        wide = model.state_dict()[name]
        expected = wide if is_sensitive(name) else wide.bfloat16()
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert torch.equal(short(IDS).logits, model.to(torch.bfloat16)(IDS).logits)
    output = short.generate(IDS, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, IDS.shape[1] + 3)


@quiet
def test_loading_in_float32_widens_everything(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@quiet
def test_config_comes_back_as_it_was(tmp_path):
    config = tiny_config(
        vocab_size=300,
        norm_eps=1e-4,
        rope_base=100_000,
        rescale_nffn=True,
        scale_emb=True,
        init_mode="bert",
        dropout=0.1,
        attention_dropout=0.2,
        hidden_dropout=0.3,
        use_cache=False,
        gradient_checkpointing=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MegalodonConfig
    for key in MegalodonConfig.__annotations__:
        if key not in ("keys_to_ignore_at_inference", "attribute_map"):
            assert getattr(again, key) == getattr(config, key) != getattr(MegalodonConfig(), key)


@quiet
@torch.no_grad()
def test_the_body_loads_from_the_whole_and_the_whole_from_itself(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body) is MegalodonModel
    expected = model.model(IDS).last_hidden_state
    assert torch.equal(body(IDS).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    assert torch.equal(again(IDS).last_hidden_state, expected)


@quiet
def test_a_tied_state_dict_needs_the_matrix_once():
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        state = model.state_dict()
        del state["lm_head.weight"]
        if tied:
            model.load_state_dict(state)
        else:
            with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
                model.load_state_dict(state)
        del state["model.embed_tokens.weight"]
        with pytest.raises(RuntimeError, match=r"embed_tokens\.weight"):
            model.load_state_dict(state)


@quiet
def test_float16_is_refused_wherever_it_is_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    tiny_model().save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    refused = [
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float16),
        lambda: AutoModel.from_pretrained(tmp_path / "saved", dtype="float16"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "short"),
        lambda: AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float16),
        lambda: MegalodonForCausalLM(tiny_config(dtype="float16")),
        lambda: tiny_model().half()(IDS),
    ]
    reason = "float16, whose range its norms overflow; use bfloat16 or float32"
    for ask in refused:
        with pytest.raises(ValueError, match=reason):
            ask()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=reason):
        tiny_model()(IDS)
    # The files themselves may still be read in a type that is served.
    AutoModelForCausalLM.from_pretrained(tmp_path / "short", dtype=torch.float32)


def test_what_is_said_while_loading_is_checked_as_a_config_is(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chunk_size=0: must be at least 1"):
        MegalodonForCausalLM.from_pretrained(tmp_path, chunk_size=0)
    loaded = MegalodonForCausalLM.from_pretrained(tmp_path, rope_base=None)
    assert loaded.config.rope_base == 10_000


def test_parameters_missing_from_a_file_are_initialised_and_named(tmp_path):
    model = MegalodonForCausalLM(tiny_config(rescale_nffn=True))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = [name for name in state if "layers.1." in name]
    for name in gone:
        del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = MegalodonForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report["missing_keys"]) == sorted(gone)
    layer = again.model.layers[1]
    assert not layer.timestep_norm.weight.any()
    assert 0.1 < layer.cema.alpha.std() < 0.3
    frequencies = layer.cema.theta.sigmoid().sort().values
    expected = model.model.layers[1].cema.theta.sigmoid().sort().values
    torch.testing.assert_close(frequencies, expected)
    assert layer.ffn.alpha.unique().tolist() == pytest.approx([0.05])
    assert layer.wz.weight.std() > 0.05
