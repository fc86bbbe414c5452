"""generate() in full: with the state and without it, every mode gives the same."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer

from megalodon import MegalodonCache, MegalodonTokenizer
from megalodon.compat import CACHE_NAME

from .models import CHUNK, tiny_model

pytestmark = pytest.mark.usefixtures("no_warnings")

NEW = CHUNK + 4  # crosses a chunk border wherever the prompt ends


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def prompt():
    return torch.randint(0, 256, (2, 2 * CHUNK + 3), generator=torch.Generator().manual_seed(1))


def padded(prompt, lengths):
    """The last lengths[i] tokens of row i, left-padded with a token that is not neutral."""
    mask = torch.arange(prompt.shape[1]) >= prompt.shape[1] - torch.tensor(lengths).unsqueeze(1)
    return torch.where(mask, prompt, 7), mask.long()


def step_logits(model, sequence, prompt_length):
    """The logits from which each generated token of sequence (B, L) was chosen, (B, new, V)."""
    with torch.no_grad():
        return model(sequence, use_cache=False).logits[:, prompt_length - 1 : -1]


@torch.no_grad()
def test_cached_logits_equal_uncached_for_splits_everywhere_around_two_chunk_borders():
    model = tiny_model().double()
    ids = torch.randint(0, 256, (2, 3 * CHUNK + 1))
    whole = model(ids, use_cache=False).logits
    for cut in range(1, 3 * CHUNK + 1):
        first = model(ids[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], cache=copy.deepcopy(first.cache)).logits
        steps = [model(token, cache=first.cache).logits for token in ids[:, cut:].split(1, dim=1)]
        for logits in (rest, torch.cat(steps, dim=1)):
            found = torch.cat([first.logits, logits], dim=1)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_takes_the_likeliest_token(model, prompt, use_cache):
    output = model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    assert torch.equal(output[:, : prompt.shape[1]], prompt)
    assert output.shape[1] == prompt.shape[1] + NEW
    expected = step_logits(model, output, prompt.shape[1]).argmax(-1)
    assert torch.equal(output[:, prompt.shape[1] :], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.3, "top_k": 0},
        {"min_p": 0.3, "top_k": 0},
        {"num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 3.0},
    ],
    ids=str,
)
def test_every_mode_gives_the_same_without_the_state(model, prompt, options):
    options = {"max_new_tokens": NEW, "do_sample": True, **options}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(prompt, use_cache=use_cache, **options))
    assert torch.equal(outputs[0], outputs[1])
    assert len(outputs[0]) == 2 * options.get("num_return_sequences", 1)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    for row in outputs[0]:
        assert not (row == plain).all(-1).any()


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("lengths", [(2 * CHUNK + 3,) * 2, (3, 2 * CHUNK + 1)], ids=str)
def test_beams_reorder_the_state(model, prompt, lengths, sample):
    ids, mask = padded(prompt, lengths)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                num_beams=4,
                num_return_sequences=3,
                do_sample=sample,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_scores=True,
            )
        )
    cached, uncached = outputs
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.sequences.shape == (6, prompt.shape[1] + NEW)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores)
    # Beams of different origin were kept, so that the state had to be reordered.
    assert (cached.beam_indices[:, 1:] != cached.beam_indices[:, :-1]).any()
    if not sample:
        for i, row in enumerate(cached.sequences):
            alone = row[-NEW - lengths[i // 3] :]
            log_p = step_logits(model, alone[None], lengths[i // 3]).log_softmax(-1)
            total = log_p[0].take_along_dim(alone[-NEW:, None], -1).sum()
            torch.testing.assert_close(cached.sequences_scores[i], total / NEW, rtol=0, atol=1e-5)


def test_stop_strings(model, prompt):
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": list(range(128, 256))}
    plain = model.generate(prompt[:1], **options)
    new = plain[0, prompt.shape[1] :].tolist()
    stop = bytes(new[3:5]).decode()
    output = model.generate(
        prompt[:1], stop_strings=[stop], tokenizer=MegalodonTokenizer(), **options
    )
    end = bytes(new).decode().index(stop) + len(stop)
    assert output[0, prompt.shape[1] :].tolist() == new[:end]


def test_a_streamer_gets_every_token_once(model, prompt, capsys):
    tokenizer = MegalodonTokenizer()
    output = model.generate(
        prompt[:1], max_new_tokens=NEW, do_sample=False, streamer=TextStreamer(tokenizer)
    )
    assert capsys.readouterr().out == tokenizer.decode(output[0]) + "\n"


@torch.no_grad()
def test_logits_to_keep_are_those_of_the_whole(model, prompt):
    whole = model(prompt).logits
    assert torch.equal(model(prompt, logits_to_keep=0).logits, whole)
    for count in (1, 3, prompt.shape[1]):
        kept = model(prompt, logits_to_keep=count).logits
        torch.testing.assert_close(kept, whole[:, -count:], rtol=0, atol=1e-6)
    places = torch.tensor([0, 4, prompt.shape[1] - 1])
    kept = model(prompt, logits_to_keep=places).logits
    torch.testing.assert_close(kept, whole[:, places], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [(2 * CHUNK + 3,) * 2, (3, 2 * CHUNK + 1)], ids=str)
def test_generation_goes_on_from_a_returned_state(model, prompt, lengths):
    """Three turns of a conversation, each prompt the whole text so far."""
    text, mask = padded(prompt, lengths)
    cache = None
    for turn in range(3):
        extra = {} if cache is None else {"cache": cache}
        output = model.generate(
            text,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            **extra,
        )
        fresh = model.generate(text, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(output.sequences, fresh)
        cache = output[CACHE_NAME]
        # The last token was chosen, not read.
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        said = torch.full((2, turn + 1), 65 + turn)
        text = torch.cat([output.sequences, said], dim=1)
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)


def test_nothing_that_grows_is_handed_to_a_step(model, prompt):
    sizes = []

    def watch(_, args, kwargs):
        given = (*args, *kwargs.values())
        sizes.append(sum(part.numel() for part in given if isinstance(part, Tensor)))

    text, mask = padded(prompt, (3, 2 * CHUNK + 1))
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    model.generate(text, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    hook.remove()
    assert sizes[0] >= 2 * text.numel()
    assert sizes[1:] == [len(text)] * (NEW - 1)


@torch.no_grad()
def test_generation_goes_on_from_a_state_read_by_hand(model, prompt):
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    for count in (5, prompt.shape[1] - 1, prompt.shape[1]):
        cache = MegalodonCache(model.config)
        model(prompt[:, :count], cache=cache)
        output = model.generate(prompt, cache=cache, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(output, expected)
    # Only the new tokens, which transformers knows by a mask of the whole text.
    cache = MegalodonCache(model.config)
    model(prompt[:, :5], cache=cache)
    output = model.generate(
        prompt[:, 5:],
        attention_mask=torch.ones_like(prompt),
        cache=cache,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(output, expected[:, 5:])


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 5}, {"num_beams": 2}], ids=str
)
def test_a_packed_prompt_goes_on_from_its_last_document(model, prompt, options):
    first, last = prompt[:1], prompt[1:, :5]
    count = first.shape[1]
    positions = torch.cat([torch.arange(count), torch.arange(5)])[None]
    packed = torch.cat([first, last], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(packed, position_ids=positions, **options)
    alone = model.generate(last, **options)
    assert torch.equal(output[:, count:], alone)


def test_a_padded_and_packed_prompt_goes_on_from_its_last_documents(model, prompt):
    ids, mask = padded(prompt, (9, prompt.shape[1]))
    positions = torch.cat([torch.arange(prompt.shape[1] - 4), torch.arange(4)]).expand_as(ids)
    options = {"max_new_tokens": NEW, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, position_ids=positions, **options)
    assert torch.equal(output[:, -NEW - 4 :], model.generate(prompt[:, -4:], **options))


def test_generation_refuses_prompts_that_end_in_padding(model, prompt):
    mask = torch.ones_like(prompt)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match=r"ends in padding, .* pad prompts on the left"):
        model.generate(prompt, attention_mask=mask, max_new_tokens=2)


@pytest.mark.filterwarnings("error")
def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match=r"continuous batching .* use generate"):
        model.generate_batch([[1, 2]])


def test_a_state_made_in_inference_mode_serves_outside(prompt):
    model = tiny_model()
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    cache = MegalodonCache(model.config)
    with torch.inference_mode():
        model(prompt[:, :-1], cache=cache)
    learning = copy.deepcopy(cache)
    output = model.generate(prompt, cache=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, expected)
    model(prompt[:, -1:], cache=learning).logits.sum().backward()


def test_embeddings_may_stand_for_the_prompt(model, prompt):
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    embeddings = model.get_input_embeddings()(prompt).detach()
    output = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, expected[:, prompt.shape[1] :])


class TestBadInput:
    def test_other_kinds_of_cache_are_refused(self, model, prompt):
        from transformers import DynamicCache

        for kind in ("static", "dynamic", "offloaded"):
            with pytest.raises(ValueError, match="one kind of cache"):
                model.generate(prompt, max_new_tokens=3, cache_implementation=kind)
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(prompt, max_new_tokens=3, cache=DynamicCache())

    def test_a_state_of_another_text_or_batch_is_refused(self, model, prompt):
        cache = model(prompt[:, :5], use_cache=True).cache
        with pytest.raises(ValueError, match="holds 2 rows and the input has 1"):
            model.generate(prompt[:1], cache=cache, max_new_tokens=3)
        # Which is said depends on how transformers cuts a prompt shorter than the cache.
        with pytest.raises(ValueError, match=r"do not continue the cache|mask has shape"):
            model.generate(prompt[:, :3], cache=cache, max_new_tokens=3)

    def test_unknown_arguments_are_refused(self, model, prompt):
        with pytest.raises(ValueError, match="segment_ids"):
            model.generate(prompt, max_new_tokens=3, segment_ids=prompt)
        with pytest.raises(TypeError, match="segment_ids"):
            model(prompt, segment_ids=prompt)
