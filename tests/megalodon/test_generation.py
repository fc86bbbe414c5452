"""generate() in full: with the state and without it, every mode gives the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from megalodon import MegalodonCache, MegalodonForCausalLM, MegalodonTokenizer
from megalodon.compat import CACHE_NAME

from .models import CHUNK, tiny_model

pytestmark = pytest.mark.usefixtures("no_warnings")

NEW = CHUNK + 4  # crosses a chunk border wherever the prompt ends


@pytest.fixture(scope="module")
def model() -> MegalodonForCausalLM:
    return tiny_model()


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(0, 256, (2, 2 * CHUNK + 3), generator=torch.Generator().manual_seed(1))


def padded(prompt: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The last lengths[i] tokens of row i, left-padded with a token that is not neutral."""
    mask = torch.arange(prompt.shape[1]) >= prompt.shape[1] - torch.tensor(lengths).unsqueeze(1)
    return torch.where(mask, prompt, 7), mask.long()


def step_logits(model: MegalodonForCausalLM, sequence: Tensor, prompt_length: int) -> Tensor:
    """The logits from which each generated token of sequence (B, L) was chosen, (B, new, V)."""
    with torch.no_grad():
        return model(sequence, use_cache=False).logits[:, prompt_length - 1 : -1]


@torch.no_grad()
def test_cached_logits_equal_uncached_for_splits_everywhere_around_two_chunk_borders(
    model: MegalodonForCausalLM,
) -> None:
    ids = torch.randint(0, 256, (2, 3 * CHUNK + 1))
    whole = model(ids, use_cache=False).logits
    for cut in range(1, 3 * CHUNK + 1):
        first = model(ids[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], cache=copy.deepcopy(first.cache)).logits
        steps = [model(token, cache=first.cache).logits for token in ids[:, cut:].split(1, dim=1)]
        for logits in (rest, torch.cat(steps, dim=1)):
            found = torch.cat([first.logits, logits], dim=1)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_takes_the_likeliest_token(
    model: MegalodonForCausalLM, prompt: Tensor, use_cache: bool
) -> None:
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
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_sampling_draws_from_what_it_should(
    model: MegalodonForCausalLM, prompt: Tensor, options: dict[str, float]
) -> None:
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                prompt, max_new_tokens=NEW, do_sample=True, use_cache=use_cache, **options
            )
        )
    assert torch.equal(outputs[0], outputs[1])
    logits = step_logits(model, outputs[0], prompt.shape[1]) / options.get("temperature", 1.0)
    drawn = outputs[0][:, prompt.shape[1] :]
    p = logits.softmax(-1)
    p_drawn = p.take_along_dim(drawn.unsqueeze(-1), -1)
    likelier = p > p_drawn
    if options.get("top_k"):
        assert (likelier.sum(-1) < options["top_k"]).all()
    if "top_p" in options:
        assert ((p * likelier).sum(-1) < options["top_p"]).all()
    if "min_p" in options:
        assert (p_drawn.squeeze(-1) >= options["min_p"] * p.amax(-1) * (1 - 1e-4)).all()
    torch.manual_seed(1)
    other = model.generate(prompt, max_new_tokens=NEW, do_sample=True, **options)
    assert not torch.equal(other, outputs[0])


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("lengths", [(2 * CHUNK + 3,) * 2, (3, 2 * CHUNK + 1)], ids=str)
def test_beams_reorder_the_state(
    model: MegalodonForCausalLM, prompt: Tensor, lengths: tuple[int, ...], sample: bool
) -> None:
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


def test_repetition_penalty_makes_seen_tokens_less_likely(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    penalty = 3.0
    output = model.generate(prompt, max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty)
    logits = step_logits(model, output, prompt.shape[1])
    for t in range(NEW):
        before = output[:, : prompt.shape[1] + t]
        seen = torch.zeros(2, 256, dtype=torch.bool).scatter(1, before, True)
        weaker = torch.where(logits[:, t] > 0, logits[:, t] / penalty, logits[:, t] * penalty)
        expected = torch.where(seen, weaker, logits[:, t]).argmax(-1)
        assert torch.equal(output[:, prompt.shape[1] + t], expected)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(plain, output)


def test_several_sequences_from_one_prompt_differ(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    torch.manual_seed(0)
    output = model.generate(prompt, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    assert output.shape == (6, prompt.shape[1] + NEW)
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in output}) == 6


def test_a_row_ends_at_eos_and_leaves_the_others_alone(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    new = plain[:, prompt.shape[1] :]
    eos = int(new[0, 3])
    assert not (new[1] == eos).any()
    end = int((new[0] == eos).nonzero()[0])
    output = model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=[eos, 300], pad_token_id=9
    )
    assert torch.equal(output[1], plain[1])
    found = output[0, prompt.shape[1] :]
    assert torch.equal(found[: end + 1], new[0, : end + 1])
    assert (found[end + 1 :] == 9).all()


class AfterTokens(StoppingCriteria):
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.count)


def test_stopping_criteria_and_stop_strings(model: MegalodonForCausalLM, prompt: Tensor) -> None:
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": list(range(128, 256))}
    plain = model.generate(prompt[:1], **options)
    criteria = StoppingCriteriaList([AfterTokens(prompt.shape[1] + 5)])
    output = model.generate(prompt[:1], stopping_criteria=criteria, **options)
    assert torch.equal(output, plain[:, : prompt.shape[1] + 5])
    new = plain[0, prompt.shape[1] :].tolist()
    stop = bytes(new[3:5]).decode()
    output = model.generate(
        prompt[:1], stop_strings=[stop], tokenizer=MegalodonTokenizer(), **options
    )
    end = bytes(new).decode().index(stop) + len(stop)
    assert output[0, prompt.shape[1] :].tolist() == new[:end]


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token_once(
    model: MegalodonForCausalLM, prompt: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder, tokenizer = Recorder(), MegalodonTokenizer()
    output = model.generate(prompt[:1], max_new_tokens=NEW, do_sample=False, streamer=recorder)
    assert recorder.tokens == output[0].tolist()
    assert recorder.ended
    model.generate(
        prompt[:1], max_new_tokens=NEW, do_sample=False, streamer=TextStreamer(tokenizer)
    )
    assert capsys.readouterr().out == tokenizer.decode(output[0]) + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt[:1], max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, prompt.shape[1] :])


@torch.no_grad()
def test_logits_to_keep_are_those_of_the_whole(model: MegalodonForCausalLM, prompt: Tensor) -> None:
    whole = model(prompt).logits
    assert torch.equal(model(prompt, logits_to_keep=0).logits, whole)
    for count in (1, 3, prompt.shape[1]):
        kept = model(prompt, logits_to_keep=count).logits
        torch.testing.assert_close(kept, whole[:, -count:], rtol=0, atol=1e-6)
    places = torch.tensor([0, 4, prompt.shape[1] - 1])
    kept = model(prompt, logits_to_keep=places).logits
    torch.testing.assert_close(kept, whole[:, places], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [(2 * CHUNK + 3,) * 2, (3, 2 * CHUNK + 1)], ids=str)
def test_generation_goes_on_from_a_returned_state(
    model: MegalodonForCausalLM, prompt: Tensor, lengths: tuple[int, ...]
) -> None:
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


def test_nothing_that_grows_is_handed_to_a_step(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    sizes = []

    def watch(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        sizes.append(sum(part.numel() for part in given if isinstance(part, Tensor)))

    text, mask = padded(prompt, (3, 2 * CHUNK + 1))
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    model.generate(text, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    hook.remove()
    assert sizes[0] >= 2 * text.numel()
    assert sizes[1:] == [len(text)] * (NEW - 1)


@torch.no_grad()
def test_generation_goes_on_from_a_state_read_by_hand(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
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
def test_a_packed_prompt_goes_on_from_its_last_document(
    model: MegalodonForCausalLM, prompt: Tensor, options: dict[str, Any]
) -> None:
    first, last = prompt[:1], prompt[1:, :5]
    count = first.shape[1]
    positions = torch.cat([torch.arange(count), torch.arange(5)])[None]
    packed = torch.cat([first, last], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    output = model.generate(packed, position_ids=positions, **options)
    alone = model.generate(last, **options)
    assert torch.equal(output[:, count:], alone)


def test_a_padded_and_packed_prompt_goes_on_from_its_last_documents(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    ids, mask = padded(prompt, (9, prompt.shape[1]))
    positions = torch.cat([torch.arange(prompt.shape[1] - 4), torch.arange(4)]).expand_as(ids)
    options = {"max_new_tokens": NEW, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, position_ids=positions, **options)
    assert torch.equal(output[:, -NEW - 4 :], model.generate(prompt[:, -4:], **options))


def test_generation_refuses_prompts_that_end_in_padding(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    mask = torch.ones_like(prompt)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match=r"ends in padding, .* pad prompts on the left"):
        model.generate(prompt, attention_mask=mask, max_new_tokens=2)


def test_a_state_made_in_inference_mode_serves_outside(prompt: Tensor) -> None:
    model = tiny_model()
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    cache = MegalodonCache(model.config)
    with torch.inference_mode():
        model(prompt[:, :-1], cache=cache)
    learning = copy.deepcopy(cache)
    output = model.generate(prompt, cache=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, expected)
    model(prompt[:, -1:], cache=learning).logits.sum().backward()


def test_a_prompt_read_in_pieces_gives_the_same(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    whole = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    pieces = model.generate(prompt, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(pieces, whole)


def test_embeddings_may_stand_for_the_prompt(model: MegalodonForCausalLM, prompt: Tensor) -> None:
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    embeddings = model.get_input_embeddings()(prompt).detach()
    output = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, expected[:, prompt.shape[1] :])


def test_hidden_states_and_logits_of_each_step_are_returned(
    model: MegalodonForCausalLM, prompt: Tensor
) -> None:
    output = model.generate(
        prompt,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_logits=True,
    )
    expected = step_logits(model, output.sequences, prompt.shape[1])
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-5)
    assert [len(step) for step in output.hidden_states] == [model.config.num_layers + 1] * 3
    assert [step[-1].shape[1] for step in output.hidden_states] == [prompt.shape[1], 1, 1]


class TestBadInput:
    def test_other_kinds_of_cache_are_refused(
        self, model: MegalodonForCausalLM, prompt: Tensor
    ) -> None:
        from transformers import DynamicCache

        for kind in ("static", "dynamic", "offloaded"):
            with pytest.raises(ValueError, match="one kind of cache"):
                model.generate(prompt, max_new_tokens=3, cache_implementation=kind)
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(prompt, max_new_tokens=3, cache=DynamicCache())

    def test_a_state_of_another_text_or_batch_is_refused(
        self, model: MegalodonForCausalLM, prompt: Tensor
    ) -> None:
        cache = model(prompt[:, :5], use_cache=True).cache
        with pytest.raises(ValueError, match="holds 2 rows and the input has 1"):
            model.generate(prompt[:1], cache=cache, max_new_tokens=3)
        # Which is said depends on how transformers cuts a prompt shorter than the cache.
        with pytest.raises(ValueError, match=r"do not continue the cache|mask has shape"):
            model.generate(prompt[:, :3], cache=cache, max_new_tokens=3)

    def test_attention_maps_are_refused(self, model: MegalodonForCausalLM, prompt: Tensor) -> None:
        with pytest.raises(ValueError, match="no attention maps"):
            model.generate(
                prompt, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True
            )

    def test_unknown_arguments_are_refused(
        self, model: MegalodonForCausalLM, prompt: Tensor
    ) -> None:
        with pytest.raises(ValueError, match="segment_ids"):
            model.generate(prompt, max_new_tokens=3, segment_ids=prompt)
        with pytest.raises(TypeError, match="segment_ids"):
            model(prompt, segment_ids=prompt)
