"""What is drafted and taken back leaves no trace: crop, and generate() with help of any kind."""

import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon import MegalodonCache
from megalodon.compat import CACHE_NAME

from .models import CHUNK, tiny_model

NEW = 3 * CHUNK


@torch.no_grad()
def speaker(noise=0.0, **options):
    """A model that does not repeat one token for ever; as an assistant it proposes 20 tokens,
    however unsure it is of them."""
    model = tiny_model(tie_word_embeddings=False, **options).double()
    model.model.final_norm.bias.zero_()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@pytest.fixture(scope="module")
def model():
    return speaker()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (1, 3 * CHUNK + 3), generator=torch.Generator().manual_seed(1))


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes)).eval()


def read(model, cache, ids, sizes):
    for piece in ids.split(sizes, dim=1):
        model(piece, cache=cache)


def same_from_here(model, cache, other, rows=1):
    """Both caches hold the same text: what is read next, in pieces and in steps, is the same."""
    assert cache.get_seq_length() == other.get_seq_length()
    more = torch.randint(0, 256, (rows, CHUNK + 3), generator=torch.Generator().manual_seed(2))
    for piece in more.split([1, 3, 1, CHUNK - 2], dim=1):
        outputs = [model(piece, cache=each, output_hidden_states=True) for each in (cache, other)]
        found, expected = ((output.logits, output.hidden_states) for output in outputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # float64
    assert torch.equal(cache.lengths, other.lengths)


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes", [[2 * CHUNK], [1] * 2 * CHUNK, [3, 1, 1, CHUNK, CHUNK - 5]], ids=str
)
@pytest.mark.parametrize("before", [0, 3])
def test_a_cropped_cache_is_one_that_never_saw_what_was_removed(model, ids, sizes, before):
    """Read in one call, in single steps and in pieces, over chunk borders, and once more."""
    for removed in (1, CHUNK + before, 2 * CHUNK):
        cache, never = MegalodonCache(model.config), MegalodonCache(model.config)
        if before:
            read(model, cache, ids[:, :before], [before])
        cache.activate_past_recording()
        read(model, cache, ids[:, before : before + 2 * CHUNK], sizes)
        cache.crop(-removed)
        left = before + 2 * CHUNK - removed
        if left:
            read(model, never, ids[:, :left], [left])
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))] if removed == 1 else []
        for each in [*copies, cache]:
            same_from_here(model, each, copy.deepcopy(never))
        cache.crop(-(CHUNK + 3))  # what was read since
        same_from_here(model, cache, never)


@torch.no_grad()
def test_crops_add_up_and_rows_with_padding_and_documents_may_be_cropped_and_reordered(model, ids):
    rows = torch.cat([ids, ids.flip(1)])
    mask, positions = torch.ones_like(rows), torch.arange(rows.shape[1]).repeat(2, 1)
    mask[0, :5] = mask[0, 12:14] = 0
    positions[0] = mask[0].cumsum(0) - 1
    positions[1, CHUNK + 2 :] -= CHUNK + 2
    cache, never = MegalodonCache(model.config), MegalodonCache(model.config)
    cache.activate_past_recording()
    left = rows.shape[1] - 6
    for each, length in ((cache, rows.shape[1]), (never, left)):
        part = {"attention_mask": mask[:, :length], "position_ids": positions[:, :length]}
        model(rows[:, :length], cache=each, **part)
    cache.crop(-2)
    cache.activate_past_recording()  # as after any crop
    cache.crop(-4)
    for each in (cache, never):
        each.reorder_cache(torch.tensor([1, 1, 0]))
    same_from_here(model, cache, never, rows=3)


@torch.no_grad()
def test_a_call_after_a_crop_that_fails_changes_nothing(model, ids, monkeypatch):
    cache, never = MegalodonCache(model.config), MegalodonCache(model.config)
    cache.activate_past_recording()
    read(model, cache, ids[:, :CHUNK], [CHUNK])
    cache.crop(-3)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.model.layers[1], "forward", Mock(side_effect=MemoryError))
        model(ids[:, :2], cache=cache)
    read(model, never, ids[:, : CHUNK - 3], [CHUNK - 3])
    for each in (cache, never):
        model(ids[:, :1], cache=each)
    same_from_here(model, cache, never)


@torch.no_grad()
def test_what_was_not_recorded_cannot_be_cropped(model, ids):
    cache = model(ids, use_cache=True).cache
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"crop\(-1\): .* 0 positions are recorded; call activate"):
        cache.crop(-1)
    cache.activate_past_recording()
    assert cache.is_croppable
    model(ids[:, :3], cache=cache)
    for count in (-4, 1):
        with pytest.raises(ValueError, match=rf"crop\({count}\): .* 3 positions are recorded"):
            cache.crop(count)
    cache.crop(-1)
    with pytest.raises(ValueError, match="2 positions are recorded"):
        cache.crop(-3)
    with pytest.raises(ValueError, match=r"stop_recording\(\) after a crop: let the model read"):
        cache.stop_recording()


HELP = {
    "lookup": {"prompt_lookup_num_tokens": 5},
    "long lookup": {"prompt_lookup_num_tokens": 3 * CHUNK, "max_matching_ngram_size": 1},
    "small Megalodon": {"assistant_model": speaker(num_layers=1)},
    "nearly the same": {"assistant_model": speaker(noise=0.02)},
    "Llama": {"assistant_model": tiny_llama()},
    "early exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("kind", HELP)
def test_help_changes_no_token_of_greedy_decoding(model, ids, kind, monkeypatch):
    cropped, crop = [], MegalodonCache.crop

    def watch(cache, tokens_to_remove):
        cropped.append(tokens_to_remove)
        crop(cache, tokens_to_remove)

    monkeypatch.setattr(MegalodonCache, "crop", watch)
    text = torch.cat([ids, ids], dim=1)  # has what can be looked up
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(text, **options)
    output = model.generate(text, return_dict_in_generate=True, **options, **HELP[kind])
    assert torch.equal(output.sequences, expected)
    assert any(cropped)  # something was drafted and taken back
    # The cache is handed back whole and with no record.
    cache, never = output[CACHE_NAME], MegalodonCache(model.config)
    assert not cache.is_croppable
    with torch.no_grad():
        model(expected[:, : cache.get_seq_length()], cache=never)
        same_from_here(model, cache, never)


@pytest.mark.parametrize("kind", ["lookup", "nearly the same"])
def test_a_prompt_with_padding_or_documents_may_have_help(model, ids, kind):
    text = torch.cat([ids, ids], dim=1)
    length, options = text.shape[1], {"max_new_tokens": NEW, "do_sample": False}
    mask = (torch.arange(length) >= 5)[None].long()
    positions = torch.cat([torch.arange(7), torch.arange(length - 7)])[None]
    for inputs in ({"attention_mask": mask}, {"position_ids": positions}):
        expected = model.generate(text, **inputs, **options)
        found = model.generate(text, **inputs, **options, **HELP[kind])
        assert torch.equal(found, expected)


def test_a_megalodon_helps_a_llama(ids):
    llama, options = tiny_llama(), {"max_new_tokens": NEW, "do_sample": False}
    expected = llama.generate(ids, **options)
    found = llama.generate(ids, assistant_model=speaker(num_layers=1).float(), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["lookup", "small Megalodon"])
def test_sampling_with_help_draws_from_what_it_should(model, ids, kind):
    text, options = torch.cat([ids, ids], dim=1), {"max_new_tokens": NEW, "do_sample": True}
    torch.manual_seed(0)
    output = model.generate(text, top_k=3, **options, **HELP[kind])
    with torch.no_grad():
        logits = model(output).logits[:, text.shape[1] - 1 : -1]
    drawn = output[:, text.shape[1] :].unsqueeze(-1)
    assert (logits > logits.take_along_dim(drawn, -1)).sum(-1).max() in (1, 2)


def test_help_needs_a_cache_that_holds_nothing(model, ids):
    cache = model(ids[:, :5], use_cache=True).cache.detach()
    with pytest.raises(ValueError, match="holds 5 positions already: begin with a new cache"):
        model.generate(ids, cache=cache, max_new_tokens=3, prompt_lookup_num_tokens=2)
