"""Models that are changed for comparison: what is left is the same, and they still stream."""

import pytest
import torch

from megalodon import MegalodonCache
from megalodon_enwik8.checkpoint import Checkpoint, save_checkpoint
from megalodon_enwik8.export import main as export
from megalodon_enwik8.models import LayerNormInstead, build_model, byte_losses, count_parameters
from megalodon_enwik8.safety import UserError

ABLATIONS = ["no_cema", "layer_norm", "one_hop", "layer_norm+one_hop+sharp_scores"]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_everything_else_is_the_same(make_tiny, ablation):
    whole = build_model(make_tiny("megalodon")).state_dict()
    part = build_model(make_tiny("megalodon", ablation=ablation)).state_dict()
    left_out = {name for name in whole if ".cema." in name} if ablation == "no_cema" else set()
    assert whole.keys() - part.keys() == left_out
    assert part.keys() <= whole.keys()
    changed = {name for name in part if not torch.equal(part[name], whole[name])}
    sharp = {name for name in part if name.endswith("query_key.gamma")}
    assert changed == (sharp if "sharp_scores" in ablation else set())


def test_parameters_of_the_shipped_size(make_tiny):
    config = make_tiny("megalodon", model_dim=384, norm_num_groups=32, cema_ndim=8)
    whole, without, *others = (
        count_parameters(build_model(config.model_copy(update={"ablation": ablation})))
        for ablation in ("none", *ABLATIONS)
    )
    assert whole - without == config.num_layers * 384 * (4 * 8 + 2)  # a, d, 2 gamma; theta, omega
    assert others == [whole] * len(others)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_pieces_and_padded_rows_equal_the_whole(make_tiny, ablation):
    model = build_model(make_tiny("megalodon", ablation=ablation)).eval()
    text = torch.randint(256, (2, 37))
    whole = model(text, use_cache=False).logits
    cache = MegalodonCache(model.config)
    pieces = [model(p, cache=cache).logits for p in text.split([5, 1, 20, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    padded = torch.nn.functional.pad(text, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(text), (3, 0))
    cache = MegalodonCache(model.config)
    found = model(padded, attention_mask=mask, cache=cache).logits[:, 3:]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [37, 37]


@pytest.mark.parametrize("ablation", ["no_cema", "layer_norm"])
def test_what_is_left_out_has_no_say(make_tiny, ablation):
    """Without the average, nothing passes a chunk's border but the norm's statistics; with
    LayerNorm, nothing but the average; with neither, nothing at all."""
    model = build_model(make_tiny("megalodon", ablation=ablation)).eval()
    chunk = model.config.chunk_size
    text = torch.randint(256, (1, 3 * chunk))
    changed = text.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256

    def reaches():
        with torch.no_grad():
            return not torch.equal(model(text).logits[:, chunk:], model(changed).logits[:, chunk:])

    assert reaches()
    for layer in model.model.layers:
        if ablation == "no_cema":
            layer.timestep_norm = LayerNormInstead(model.config)
        else:
            layer.cema.alpha.data.fill_(-100.0)  # nothing gets into the state
    model.model.final_norm = LayerNormInstead(model.config)
    assert not reaches()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change", "stays"),
    [
        ("megalodon", {}, False),
        ("megalodon", {"ablation": "one_hop"}, True),
        ("llama", {}, True),
        ("llama", {"two_hop": True}, False),
    ],
)
def test_with_one_hop_alone_what_the_first_brings_stays_in_the_stream(
    make_tiny, name, change, stays
):
    model = build_model(make_tiny(name, **change)).eval()
    text = torch.randint(256, (1, 20))
    for layer in model.model.layers:
        for parameter in (layer.ffn if name == "megalodon" else layer.mlp).parameters():
            parameter.zero_()
    first, last = model(text, output_hidden_states=True).hidden_states[:2]
    assert torch.equal(first, last) is not stays


@torch.no_grad()
def test_sharp_scores_start_as_cosines_times_the_root_of_the_head_size(make_tiny):
    model = build_model(make_tiny("megalodon", ablation="sharp_scores", z_dim=32, num_heads=2))
    query_key = model.model.layers[0].query_key
    z = torch.randn(1, 7, 32)
    q, k = query_key(z, model.model._rotary(z.device)[:7])
    own = (q * k).sum(-1)  # of a step with itself: a cosine of 1, which no rotation changes
    torch.testing.assert_close(own, torch.full_like(own, 16**0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_weight_is_trained(make_tiny, ablation):
    model = build_model(make_tiny("megalodon", ablation=ablation))
    byte_losses(model, torch.randint(256, (2, 25))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_llama_with_two_hops_reads_in_pieces_what_it_reads_at_once(make_tiny):
    model = build_model(make_tiny("llama", two_hop=True)).eval()
    text = torch.randint(256, (2, 20))
    before = model(text[:, :13], use_cache=True)
    after = model(text[:, 13:], past_key_values=before.past_key_values)
    pieces = torch.cat([before.logits, after.logits], 1)
    torch.testing.assert_close(pieces, model(text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("megalodon", {"ablation": "no_cema"}, "ablation=no_cema"),
        ("llama", {"two_hop": True}, "two_hop=True"),
    ],
)
def test_a_changed_model_is_not_exported(make_tiny, tmp_path, name, change, said):
    config = make_tiny(name, **change)
    path = tmp_path / "final.pt"
    state = build_model(config).state_dict()
    save_checkpoint(path, Checkpoint(config, 3, "", {}, state, None))
    with pytest.raises(UserError, match=f"trained with {said}, for which no library has"):
        export([str(path), str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()
