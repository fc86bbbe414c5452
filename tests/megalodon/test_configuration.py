"""The family's names: what a config takes, and what it refuses in one line."""

import itertools
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import megalodon
from megalodon import MegalodonConfig, MegalodonForCausalLM

from .models import tiny_config, tiny_model

# In a config of 8-token chunks and 256 tokens: what says what the model does, and what does not.
FAMILY = {
    "norm_affine": ([True], [False, None]),
    "output_size": ([-1, None, 256], [100]),
    "efficient_attn": ([None], ["fused"]),
    "max_cache_len": ([None, -1, 8], [4, 16]),
    "cache_unbounded": ([False], [True]),
    "max_positions": ([8, 1_000_000], [7, "many"]),
}


def test_the_7b_setup_is_that_of_the_paper():
    assert MegalodonConfig.from_7b_setup().to_dict() == MegalodonConfig.mega7_3b().to_dict()


def test_no_rope_base_is_10000():
    assert MegalodonConfig(rope_base=None).rope_base == 10_000


@pytest.mark.parametrize("name", FAMILY)
def test_the_familys_other_names_are_taken_where_they_say_what_the_model_does(name):
    served, refused = FAMILY[name]
    for value in served:
        assert tiny_config(**{name: value}).to_dict() == tiny_config().to_dict()
    for value in refused:
        with pytest.raises(ValueError, match=rf"^{name}={value!r}: [^\n]+$"):
            tiny_config(**{name: value})


def test_share_emb_ties_the_output_matrix():
    for tied in (True, False):
        config = tiny_config(share_emb=tied)
        assert config.share_emb is config.tie_word_embeddings is tied
        assert "share_emb" not in config.to_dict()
    with pytest.raises(Exception, match="tie_word_embeddings"):
        tiny_config(share_emb="yes")


@pytest.mark.parametrize("name", ["gradient_checkpointing", "layerwise_ckpt"])
def test_checkpointing_is_switched_on_in_the_model_and_kept_in_no_file(tmp_path, name):
    assert not any(layer.gradient_checkpointing for layer in tiny_model().model.layers)
    model = MegalodonForCausalLM(tiny_config(**{name: True}))
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    assert name not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: True})
    assert all(layer.gradient_checkpointing for layer in again.model.layers)


def test_an_unknown_name_is_refused_unless_a_file_holds_it(tmp_path):
    for name in ("num_layer", "is_decoder", "temperature"):
        with pytest.raises(ValueError, match=f"^{name}=3: MegalodonConfig has no such name$"):
            tiny_config(**{name: 3})
    # What transformers knows of any config.
    tiny_config(attn_implementation="eager", torch_dtype="bfloat16", num_labels=3, _name_or_path="")
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"of_a_newer_transformers": 1}))
    assert AutoConfig.from_pretrained(tmp_path).model_dim == 32
    path.write_text(json.dumps(values | {"norm_affine": False}))
    with pytest.raises(ValueError, match="norm_affine=False"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_file_holds_every_size_whatever_the_defaults_are(tmp_path):
    for config in (MegalodonConfig(), tiny_config()):
        config.save_pretrained(tmp_path)
        held = json.loads((tmp_path / "config.json").read_text())
        own = set(MegalodonConfig.__annotations__) - {
            "keys_to_ignore_at_inference",
            "attribute_map",
        }
        assert own <= set(held)


def test_configure_precision_sets_what_it_is_told_and_no_more():
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction")
    switches = torch.backends.cuda.matmul
    before = {name: getattr(switches, name) for name in names}
    try:
        for name, value in itertools.product(names, (True, False)):
            others = {other: getattr(switches, other) for other in names if other != name}
            megalodon.configure_precision(**{**dict.fromkeys(names), name: value})
            assert getattr(switches, name) is value
            assert others == {other: getattr(switches, other) for other in others}
    finally:
        megalodon.configure_precision(**before)
    megalodon.configure_precision(allow_tf32=before["allow_tf32"])  # the other is left as it is
    assert before == {name: getattr(switches, name) for name in names}
