"""The model as a whole: sizes, causality, streaming, options, initialisation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from megalodon import MegalodonCache, MegalodonConfig, MegalodonForCausalLM
from megalodon.ops.cema import BLOCK

from .models import CHUNK, config_of_the_comparison, randomize, tiny_config, tiny_model

RELEASED = {
    "mega200m": 220_627_968,
    "mega1_3b": 1_342_832_640,
    "mega1_3b_pg19": 1_327_628_288,
    "mega7_1b": 7_117_381_632,
    "mega7_3b": 7_385_817_088,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    make = getattr(MegalodonConfig, name)
    with torch.device("meta"):
        assert count(MegalodonForCausalLM(make())) == RELEASED[name]
    assert f" {RELEASED[name]:,} parameters" in make.__doc__


@torch.no_grad()
def test_changing_a_token_never_changes_a_logit_before_it():
    model = tiny_model().double()
    ids = torch.randint(0, 256, (1, 3 * CHUNK + 3))
    base = model(ids).logits
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 256
        logits = model(changed).logits
        assert torch.equal(logits[:, :t], base[:, :t])
        # and reaches the last token, however many chunks away
        assert not torch.equal(logits[:, -1], base[:, -1])


@torch.no_grad()
def after_a_prompt():
    model = tiny_model()
    ids = torch.randint(0, 256, (1, BLOCK + 1))
    cache = MegalodonCache(model.config)
    model(ids, cache=cache)
    return model, ids, cache


@pytest.mark.parametrize("between", ["a longer piece", "a call with gradients", "map", "a copy"])
@pytest.mark.parametrize("few", [1, 3])
@torch.no_grad()
def test_decoding_goes_on_with_changed_weights_where_something_else_lies_between(between, few):
    model, ids, cache = after_a_prompt()
    model.requires_grad_(False)  # for a cache without a graph, which can be copied
    model(ids[:, :few], cache=cache)  # keeps what it multiplies with
    model.model.layers[0].cema.alpha += 1
    if between == "a longer piece":
        model(ids, cache=cache)
    elif between == "a call with gradients":
        with torch.enable_grad():
            model(ids[:, :1], cache=cache)
    elif between == "map":
        model.double()
        cache.map(lambda t: t.double() if t.is_floating_point() else t)
    else:
        cache = copy.deepcopy(cache)
    before = copy.deepcopy(cache)
    found = model(ids[:, :few], cache=cache).logits
    right = copy.deepcopy(model)(ids[:, :few], cache=before).logits
    assert torch.equal(found, right)


@torch.no_grad()
def test_a_cache_keeps_what_few_tokens_are_multiplied_with_until_something_else_runs():
    model, ids, cache = after_a_prompt()
    cemas = {(layer.cema, one) for layer in model.model.layers for one in (True, False)}
    assert not cache.kept
    model(ids[:, :1], cache=cache)
    model(ids[:, :BLOCK], cache=cache)
    kept = dict(cache.kept)
    assert kept.keys() == cemas
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    model(ids[:, :1].expand(2, 1), cache=cache)
    model(ids[:, :3].expand(2, 3), cache=cache)
    assert all(cache.kept[cema] is kept[cema] for cema in cemas)
    cache.reset()
    assert not cache.kept
    model(ids, cache=cache)
    assert not cache.kept
    model(ids[:, :2], cache=cache)
    assert cache.kept
    assert not pickle.loads(pickle.dumps(cache)).kept


@torch.no_grad()
def test_a_cache_that_goes_on_with_another_model_takes_what_is_that_models():
    model, ids, cache = after_a_prompt()
    model(ids[:, :1], cache=cache)
    other = copy.deepcopy(model)
    other.model.layers[0].cema.alpha += 1
    before = copy.deepcopy(cache)
    found = other(ids[:, :1], cache=cache).logits
    assert torch.equal(found, other(ids[:, :1], cache=before).logits)
    assert not torch.equal(found, model(ids[:, :1], cache=copy.deepcopy(before)).logits)


def test_gradients_flow_through_the_cache():
    model = tiny_model().double()
    ids = torch.randint(0, 256, (2, 2 * CHUNK + 3))
    gradients = []
    for cuts in ([], [CHUNK + 1], [CHUNK + 1, CHUNK + 2]):
        model.zero_grad()
        cache, logits = MegalodonCache(model.config), []
        for piece in ids.tensor_split(cuts, dim=1):
            logits.append(model(piece, cache=cache).logits)
        torch.cat(logits, dim=1).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpoints_pass_gradients_through_a_cache_or_say_that_they_do_not():
    ids, gradients = torch.randint(0, 256, (2, 2 * CHUNK)), []
    for reentrant in (None, False, True):
        model = tiny_model().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        cache = MegalodonCache(model.config)
        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=True lose the gradients"):
                model(ids, cache=cache)
            model(ids, labels=ids).loss.backward()
        model.generate(ids, max_new_tokens=2)  # in training mode, too
        if reentrant:
            continue
        logits = [model(piece, cache=cache).logits for piece in ids.split(CHUNK, dim=1)]
        torch.cat(logits, dim=1).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_a_meta_model_runs_forward_and_backward():
    with torch.device("meta"):
        model = MegalodonForCausalLM(tiny_config()).train()
        ids = torch.zeros(2, CHUNK + 3, dtype=torch.int64)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.is_meta for p in model.parameters())
    assert model.eval()(ids[:, :1]).logits.shape == (2, 1, 256)


def test_detached_cache_stops_gradients():
    model = tiny_model()
    ids = torch.randint(0, 256, (1, CHUNK))
    cache = model(ids, use_cache=True).cache
    assert cache.final_norm.mean.requires_grad
    cache.detach()
    assert not cache.final_norm.mean.requires_grad
    assert not cache.states[0].cema.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"swiglu": False},
        {"rescale_nffn": True},
        {"scale_emb": True},
        {"tie_word_embeddings": False},
        {"output_ffn_bias": False},
        {"num_heads": 1},
        {"cema_ndim": 1},
        {"norm_num_groups": 1},
        {"chunk_size": 1},
        {"rope_base": 100_000.0},
        {"norm_eps": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_changes_the_model_and_trains(options):
    ids = torch.randint(0, 256, (2, CHUNK + 1))

    def logits(config):
        torch.manual_seed(0)
        model = MegalodonForCausalLM(config)
        randomize(model)
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        return model(ids).logits.detach()

    changed, plain = logits(tiny_config(**options)), logits(tiny_config())
    assert not torch.allclose(changed, plain)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "hidden_dropout"])
def test_dropouts_act_in_training_only(name):
    model = tiny_model(**{name: 0.5})
    ids = torch.randint(0, 256, (2, CHUNK + 1))
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    setattr(model.config, name, 0.0)  # the config says so at each call
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_second_hop_leaves_out_the_first():
    """With W_2 and b_2 zero a block is the identity: the residual of the FFN is its input."""
    model = tiny_model()
    for layer in model.model.layers:
        nn.init.zeros_(layer.ffn.w2.weight)
        nn.init.zeros_(layer.ffn.w2.bias)
    ids = torch.randint(0, 256, (1, CHUNK))
    states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], states[-2], rtol=0, atol=0)


def test_initialisation_follows_the_paper():
    torch.manual_seed(0)
    model = MegalodonForCausalLM(config_of_the_comparison(num_layers=1, tie_word_embeddings=False))
    layer, dim = model.model.layers[0], 384
    assert math.isclose(layer.wv.weight.std().item(), (3 * dim) ** -0.5, rel_tol=0.02)
    assert math.isclose(layer.ffn.w2.weight.std().item(), (3 * 1024) ** -0.5, rel_tol=0.02)
    assert not layer.wv.bias.any()
    for gaussian in (model.lm_head.weight, model.model.embed_tokens.weight):
        assert math.isclose(gaussian.std().item(), dim**-0.5, rel_tol=0.03)
        assert gaussian.abs().max() <= 3 * dim**-0.5
    cema = layer.cema
    assert math.isclose(cema.alpha.std().item(), 0.2, rel_tol=0.05)
    assert math.isclose(cema.delta.std().item(), 0.2, rel_tol=0.05)
    frequencies = cema.theta.sigmoid().sort(descending=True).values
    k = torch.arange(1, dim + 1)
    expected = torch.exp(-k * math.log(dim) / dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(cema.theta, cema.theta.sort().values)
    assert math.isclose(cema.gamma[..., 0].std().item(), 1.0, rel_tol=0.05)
    assert not cema.gamma[..., 1].any()
    assert math.isclose(cema.omega.std().item(), 0.25, rel_tol=0.1)
    assert cema.omega.abs().max() <= 1
    for module in (layer.timestep_norm, layer.rms_norm, layer.ffn_norm, layer.query_key):
        assert not any(p.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("mode", "std"),
    [
        ("he", (3 * 384) ** -0.5),
        ("xavier", (2 / (384 + 1024)) ** 0.5),
        ("bert", 0.02),
        ("gaussian", 384**-0.5),
        ("none", (3 * 384) ** -0.5),
    ],
)
def test_init_modes(mode, std):
    torch.manual_seed(0)
    config = config_of_the_comparison(num_layers=1, init_mode=mode, rescale_nffn=True)
    layer = MegalodonForCausalLM(config).model.layers[0]
    assert math.isclose(layer.ffn.w1.weight.std().item(), std, rel_tol=0.03)
    assert bool(layer.ffn.w1.bias.any()) is (mode == "none")
    assert layer.ffn.alpha.unique().tolist() == pytest.approx([0.1])


def test_bfloat16_stays_close_to_float32():
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 3 * CHUNK))
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids).logits.float()
    # Three decimal digits through the layers: a few per cent of the logits' spread.
    assert (found - expected).std() < 0.05 * expected.std()


class TestBadInput:
    def test_ids_outside_the_vocabulary(self):
        for bad in (256, -1):
            with pytest.raises(ValueError, match="outside the vocabulary of 256"):
                tiny_model()(torch.tensor([[0, bad]]))

    def test_cache_of_another_model(self):
        cache = MegalodonCache(tiny_config(num_layers=1))
        with pytest.raises(ValueError, match=r"another model: its num_layers is 1"):
            tiny_model()(torch.zeros(1, 1, dtype=torch.long), cache=cache)

    def test_mask_of_the_wrong_shape(self):
        ids = torch.zeros(1, 4, dtype=torch.long)
        for shape in [(1, 3), (2, 4), (1, 1, 4, 4)]:
            with pytest.raises(ValueError, match="attention_mask has shape"):
                tiny_model()(ids, attention_mask=torch.ones(shape))

    def test_positions_of_the_wrong_shape(self):
        ids = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="position_ids has shape"):
            tiny_model()(ids, position_ids=torch.arange(3)[None])

    def test_positions_that_do_not_continue_the_cache(self):
        model = tiny_model()
        cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache
        with pytest.raises(ValueError, match="do not continue the cache"):
            model(
                torch.zeros(1, 2, dtype=torch.long),
                cache=cache,
                position_ids=torch.tensor([[7, 8]]),
            )

    def test_neither_or_both_inputs(self):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            tiny_model()()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("z_dim", 13),
            ("model_dim", 30),
            ("chunk_size", 0),
            ("dropout", 1.0),
            ("num_heads", 5),
            ("norm_eps", 0.0),
            ("rope_base", math.nan),
        ],
    )
    def test_impossible_sizes(self, key, value):
        with pytest.raises(Exception, match=key):
            tiny_config(**{key: value})
