"""Long texts: any cut gives the same, the state stays right and small, decoding never ends."""

import copy

import pytest
import torch

from megalodon import MegalodonCache, modules
from megalodon.ops.cema import cema_reference
from megalodon.ops.timestep_norm import timestep_norm_reference

from .gradients import flatten
from .models import CHUNK, tiny_model


def make_text(length, rows=1):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def stream(model, text, pieces):
    """The logits of the last 16 tokens, which the last piece holds, and the state after them."""
    cache = MegalodonCache(model.config)
    for piece in text.split(pieces, dim=1):
        logits = model(piece, cache=cache, logits_to_keep=16).logits
    return logits, cache


def cut(length, size):
    """Pieces of one size; the last takes what is left, and at least 16 tokens."""
    count = (length - 16) // size
    return [size] * count + [length - count * size]


def test_any_cut_of_a_long_text_gives_the_same_logits():
    model, text = tiny_model(), make_text(30_000)
    whole, _ = stream(model, text, [30_000])
    odd = [1, 2, CHUNK, 31, 32, 33, 4095, 4096, 5000]
    for pieces in (cut(30_000, 10_000), cut(30_000, 777), [*odd, 30_000 - sum(odd)]):
        logits, cache = stream(model, text, pieces)
        assert cache.positions == 30_000
        # float32, over 30,000 tokens: two ways of summing the same numbers.
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


def test_the_state_of_a_long_prefill_is_that_of_feeding_token_by_token():
    model, text = tiny_model(), make_text(1003, rows=2)
    _, prefilled = stream(model, text, [1003])
    _, fed = stream(model, text, [1] * 1003)
    assert prefilled.positions == fed.positions == 1003
    assert prefilled.is_uniform
    assert fed.is_uniform
    filled = 1003 % CHUNK
    for one, other in zip(prefilled.states, fed.states, strict=True):
        torch.testing.assert_close(one.norm, other.norm, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.cema, other.cema, rtol=0, atol=1e-5)
        for kept, read in zip(one.attention, other.attention, strict=True):
            # Beyond what the chunk in progress holds, a buffer may hold anything.
            torch.testing.assert_close(kept[:, :filled], read[:, :filled], rtol=0, atol=1e-5)
    assert prefilled.final_norm is not None
    torch.testing.assert_close(prefilled.final_norm, fed.final_norm, rtol=0, atol=1e-6)


def saved_bytes(model, length):
    """What the forward pass of a training step keeps for its backward, which runs as well."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    text = make_text(length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(text, labels=text).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return sum(kept.values())


@pytest.mark.parametrize("chunk_size", [256, 2048])
def test_memory_of_training_is_linear_in_the_length_and_checkpointing_lowers_it(chunk_size):
    model = tiny_model(chunk_size=chunk_size, num_layers=3).train()
    short, long = saved_bytes(model, 4096), saved_bytes(model, 8192)
    assert 1.8 * short < long < 2.1 * short
    model = tiny_model(chunk_size=chunk_size, num_layers=3, gradient_checkpointing=True).train()
    assert saved_bytes(model, 8192) < long / 3


MILLION = 1_000_000


@torch.no_grad()
def test_after_a_million_tokens_the_state_is_as_small_as_after_ten_and_generation_goes_on():
    model = tiny_model(num_layers=1, model_dim=16, value_dim=16, ffn_hidden_dim=16)
    text = make_text(MILLION)
    (_, early), (_, cache) = (
        stream(model, text[:, :16], [16]),
        stream(model, text, cut(MILLION, 50_000)),
    )
    assert (cache.positions, early.positions) == (MILLION, 16)
    assert cache.nbytes == early.nbytes
    assert all(tensor.isfinite().all() for tensor in flatten([cache.states, cache.final_norm]))
    byhand = copy.deepcopy(cache)
    output = model.generate(
        torch.tensor([[65, 66]]),
        attention_mask=torch.ones(1, MILLION + 2, dtype=torch.int64),
        cache=cache,
        max_new_tokens=2 * CHUNK,
        do_sample=False,
    )
    assert output.shape == (1, 2 + 2 * CHUNK)
    assert cache.positions == MILLION + 1 + 2 * CHUNK  # the last token is chosen, not read
    tokens, read = [65, 66], torch.tensor([[65, 66]])
    for _ in range(2 * CHUNK):
        tokens.append(int(model(read, cache=byhand).logits[0, -1].argmax()))
        read = torch.tensor([tokens[-1:]])
    assert output[0].tolist() == tokens
    assert cache.nbytes == byhand.nbytes


def literal(monkeypatch):
    """Let the model's norms and averages run as they are defined, step after step."""
    monkeypatch.setattr(
        modules,
        "timestep_norm",
        lambda x, weight, bias, groups, eps, state, segments, dtype, **_: timestep_norm_reference(
            x, weight, bias, groups, eps, state
        ),
    )
    monkeypatch.setattr(
        modules,
        "cema",
        lambda x, c, state, segments, **_: cema_reference(x, c, state),
    )


@pytest.mark.parametrize(
    "length",
    [2_000, pytest.param(MILLION, marks=pytest.mark.slow)],  # the latter: ten minutes
)
def test_the_last_logits_of_a_long_text_are_those_of_the_float64_reference(length, monkeypatch):
    model, text = tiny_model(num_layers=1), make_text(length)
    logits, _ = stream(model, text, cut(length, 4096))
    model.double()
    exact, _ = stream(model, text, cut(length, 50_000))
    literal(monkeypatch)
    expected, cache = stream(model, text, cut(length, 50_000))
    assert expected.dtype == cache.states[0].cema.dtype == torch.float64
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.1
