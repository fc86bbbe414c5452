"""Weights to and from the released code's names."""

import math

import pytest
import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.conversion import from_released, to_released
from megalodon.ops.chunk_attention import rotary_table

from .models import CHUNK, tiny_config, tiny_model

OPTIONS = [
    {},
    {"tie_word_embeddings": False},
    {"swiglu": False, "output_ffn_bias": False},
    {"output_ffn_bias": False},
    {"rescale_nffn": True, "num_heads": 1},
    {"cema_ndim": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_there_and_back_is_the_same_model(options):
    model = tiny_model(**options)
    ours = model.state_dict()
    back = from_released(to_released(ours, model.config), model.config)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    again = MegalodonForCausalLM(model.config).eval()
    again.load_state_dict(back)
    ids = torch.randint(0, 256, (2, CHUNK + 1))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["mega200m", "mega1_3b", "mega1_3b_pg19", "mega7_1b", "mega7_3b"])
def test_the_table_covers_the_released_models(name):
    config = getattr(MegalodonConfig, name)(num_layers=1)
    with torch.device("meta"):
        state = MegalodonForCausalLM(config).state_dict()
    released = to_released(state, config)
    assert released["layers.0.mega.cema.alpha"].shape == (config.model_dim, 16, 1)
    assert released["layers.0.mega.gamma"].shape == (2, config.z_dim)
    assert released["output.output.weight"].shape == (config.vocab_size, config.model_dim)
    assert ("layers.0.nffn.fc3.weight" in released) is config.swiglu
    assert "layers.0.mega.wh2.bias" not in released


def adjacent_pair_scores(state, x, config):
    """Scores of one chunk as the released code has them: complex rotation of adjacent pairs.

    x: (B, L, D), the input of wz. Returns (B, H, L, L).
    """
    z = x @ state["layers.0.mega.wz.weight"].T + state["layers.0.mega.wz.bias"]
    z = z.unflatten(-1, (config.num_heads, -1))
    z = z * (z.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
    head_dim = z.shape[-1]
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(x.shape[1]).double(), config.rope_base**-exponent)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)

    def rotated(row):
        gamma = state["layers.0.mega.gamma"][row].view(config.num_heads, -1)
        beta = state["layers.0.mega.beta"][row].view(config.num_heads, -1)
        y = z * (gamma + 1) / math.sqrt(head_dim) + beta
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    return torch.einsum("bqhd,bkhd->bhqk", rotated(0), rotated(1))


@torch.no_grad()
def test_half_split_pairs_give_the_scores_of_adjacent_pairs():
    model = tiny_model().double()
    config, block = model.config, model.model.layers[0]
    x = torch.randn(2, CHUNK, config.model_dim, dtype=torch.float64)
    table = rotary_table(CHUNK, config.z_dim // config.num_heads, config.rope_base)
    q, k = block.query_key(block.wz(x), table)
    ours = torch.einsum("bqhd,bkhd->bhqk", q, k)
    theirs = adjacent_pair_scores(to_released(model.state_dict(), config), x, config)
    # The rotary table is float32.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    unpermuted = {**to_released(model.state_dict(), config)}
    unpermuted["layers.0.mega.wz.weight"] = block.wz.weight
    assert not torch.allclose(ours, adjacent_pair_scores(unpermuted, x, config), atol=1e-2)


def test_every_problem_is_named_in_one_error():
    model = tiny_model()
    released = to_released(model.state_dict(), model.config)
    released["layers.1.mega.wq.bias"] = released.pop("layers.1.mega.wz.bias")
    released["layers.0.nffn.fc1.weight"] = released["layers.0.nffn.fc1.weight"].T
    released["embed.weight"] = torch.zeros(300, 32)
    with pytest.raises(ValueError, match="world size one") as error:
        from_released(released, model.config)
    message = str(error.value)
    assert "\n" not in message
    assert "layers.1.mega.wq.bias is (16,), must be absent" in message
    assert "layers.1.mega.wz.bias is absent, must be (16,)" in message
    assert "layers.0.nffn.fc1.weight is (32, 40), must be (40, 32)" in message
    assert "embed.weight is (300, 32), must be (256, 32)" in message
    with pytest.raises(ValueError, match=r"layers\.2\.\S+ is absent"):
        to_released(model.state_dict(), tiny_config(num_layers=3))


def test_constants_are_written_and_held_to_those_of_this_model():
    model = tiny_model()
    released = to_released(model.state_dict(), model.config)
    groups = model.config.norm_num_groups
    for norm in ("layers.0.mega.timenorm", "layers.1.mega.timenorm", "output.final_norm"):
        assert released[f"{norm}.prior_count"].dtype == torch.int64
        assert not released[f"{norm}.prior_count"]
        for prior in ("prior_mean", "prior_logv"):
            assert torch.equal(released[f"{norm}.{prior}"], torch.zeros(groups))
    assert released["rope.freqs"].shape == (4,)
    from_released({k: v for k, v in released.items() if "prior" not in k}, model.config)
    released["output.final_norm.prior_mean"] += 0.5
    match = "rope.freqs is not this model's; output.final_norm.prior_mean is not this model's"
    with pytest.raises(ValueError, match=match):
        from_released(released, tiny_config(rope_base=100_000.0))


def test_dtypes_stay_as_they_are():
    model = tiny_model().to(torch.bfloat16)
    released = to_released(model.state_dict(), model.config)
    assert released["layers.0.mega.wz.weight"].dtype == torch.bfloat16
    assert released["layers.0.mega.cema.alpha"].dtype == torch.float32
