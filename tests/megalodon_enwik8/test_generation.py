"""Sampling is a pure function of its arguments, and what streams is fit for a screen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8 import generation
from megalodon_enwik8.generation import ByteStreamer, PrintableDecoder, generate_bytes
from megalodon_enwik8.models import build_model
from megalodon_enwik8.safety import UserError


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_any_bytes_in_any_pieces_become_valid_printable_text(pieces):
    shown = []
    streamer = ByteStreamer(shown.append)
    for piece in pieces:
        streamer.put(torch.tensor(list(piece), dtype=torch.long))
    streamer.end()
    text = "".join(shown)
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert text.encode().decode() == text
    assert text == PrintableDecoder().decode(b"".join(pieces), final=True)


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=20))
def test_text_cut_between_any_bytes_stays_itself(text):
    decoder = PrintableDecoder()
    data = text.encode()
    assert "".join(decoder.decode(data[i : i + 1]) for i in range(len(data))) == text


def test_each_byte_is_shown_as_soon_as_its_character_is_whole():
    shown = []
    streamer = ByteStreamer(shown.append)
    for byte in "aé".encode():
        streamer.put(torch.tensor([byte]))
    assert shown == ["a", "", "é"]


def test_an_escape_sequence_cannot_reach_the_terminal():
    assert PrintableDecoder().decode(b"\x1b[2J\r\x07ok\n") == "\ufffd[2J\ufffd\ufffdok\n"


@pytest.fixture
def model(make_tiny, model_name):
    return build_model(make_tiny(model_name, seed=3)).eval()


def test_the_same_seed_gives_the_same_bytes(model):
    def sample(seed):
        torch.rand(2)  # whatever happened to the generator before
        return generate_bytes(model, b"The ", length=30, seed=seed, min_p=0.01)

    assert len(sample(1)) == 30
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_temperature_zero_takes_the_likeliest_byte_each_time(model):
    text = b"The "
    made = generate_bytes(model, text, length=20, seed=1, temperature=0)
    for byte in made:  # across chunk borders, without a cache
        with torch.no_grad():
            logits = model(torch.tensor([list(text)])).logits[0, -1]
        assert byte == logits.argmax().item()
        text += bytes([byte])


def test_top_k_1_and_min_p_1_are_greedy(model):
    greedy = generate_bytes(model, b"x", length=20, seed=1, temperature=0)
    assert generate_bytes(model, b"x", length=20, seed=2, top_k=1) == greedy
    assert generate_bytes(model, b"x", length=20, seed=2, min_p=1.0) == greedy


@pytest.mark.parametrize("temperature", [1e-29, 1e-31, 1e-255])
def test_the_coldest_temperatures_are_greedy(model, temperature):
    greedy = generate_bytes(model, b"x", length=20, seed=1, temperature=0)
    assert generate_bytes(model, b"x", length=20, seed=2, temperature=temperature) == greedy


def test_without_limits_every_byte_can_be_drawn(model):
    # transformers' own default would leave out all but the 50 likeliest.
    made = generate_bytes(model, b"x", length=600, seed=1, temperature=100.0)
    assert len(set(made)) > 200


def test_ids_beyond_the_bytes_are_never_drawn(make_tiny, model_name):
    model = build_model(make_tiny(model_name, num_tokens=300)).eval()
    assert len(generate_bytes(model, b"x", length=200, seed=1, temperature=100.0)) == 200


def test_sampling_leaves_the_mode_and_warns_of_nothing(model, recwarn, capsys):
    model.train()
    for options in ({"temperature": 0.0}, {"min_p": 0.1}, {"top_k": 300}):
        generate_bytes(model, b"x", length=5, seed=1, **options)
    assert model.training
    assert [w for w in recwarn if "script_method" not in str(w.message)] == []
    assert capsys.readouterr().err == ""


def test_a_long_prompt_read_in_pieces_is_continued_as_when_read_at_once(model, monkeypatch):
    prompt = bytes(range(100))
    at_once = generate_bytes(model, prompt, length=20, seed=1)
    monkeypatch.setattr(generation, "_PREFILL", 7)
    assert generate_bytes(model, prompt, length=20, seed=1) == at_once


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_that_is_not_finite_is_one_line(model, temperature):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.train()
    with pytest.raises(UserError, match="the model's output is not finite"):
        generate_bytes(model, b"x", length=2, seed=1, temperature=temperature)
    assert model.training
