"""Every byte of a text is predicted once, from the bytes that it should be, and no other."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalodon_enwik8 import evaluation as scoring
from megalodon_enwik8.evaluation import RANGE_ENDS, Score, score_streams, score_windows
from megalodon_enwik8.models import build_model


def make_text(length):
    return np.random.default_rng(7).integers(256, size=length, dtype=np.uint8)


@torch.no_grad()
def loss_of_last(model, text):
    """Of the last byte of `text`, given all before it."""
    ids = torch.from_numpy(text.astype(np.int64))
    logits = model(ids[None, :-1]).logits[0, -1]
    return F.cross_entropy(logits, ids[-1]).item()


def literal_score(model, text, starts):
    """starts[i]: where the reading begins that predicts byte i + 1."""
    score = Score()
    for i, start in enumerate(starts):
        seen = i + 1 - start
        index = next(j for j, end in enumerate(RANGE_ENDS) if seen <= end)
        score.predicted[index] += 1
        score.total[index] += loss_of_last(model, text[start : i + 2])
    return score


def assert_same(one, other):
    np.testing.assert_array_equal(one.predicted, other.predicted)
    np.testing.assert_allclose(one.total, other.total, rtol=1e-4)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.fixture
def model(make_tiny, model_name):
    return build_model(make_tiny(model_name)).eval()


@pytest.fixture
def megalodon(make_tiny):
    return build_model(make_tiny("megalodon")).eval()


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(200, 50, 50), (120, 40, 13), (75, 24, 1), (60, 24, 23), (49, 24, 24), (10, 24, 5), (2, 1, 1)],
)
def test_windows_predict_each_byte_once_from_at_least_context_minus_stride(
    model, length, context, stride, monkeypatch
):
    text = make_text(length)
    starts, begin, counted = [], 0, 0
    while counted < length - 1:
        end = min(begin + context, length - 1)
        starts += [begin] * (end - counted)
        begin, counted = begin + stride, end
    later = list(enumerate(starts))[context:]
    assert all(i + 1 - start >= context - stride for i, start in later)
    expected = literal_score(model, text, starts)
    assert expected.predicted.sum() == length - 1
    for tokens in (1, 100, 8192):
        monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", tokens)
        score = score_windows(model, text, context=context, stride=stride, use_autocast=False)
        assert_same(score, expected)


@pytest.mark.parametrize(
    ("length", "streams", "piece"),
    [(100, 1, 7), (100, 3, 8), (90, 7, 1), (101, 4, 1000), (41, 40, 3), (2, 1, 1)],
)
def test_streams_predict_each_byte_once_from_the_whole_of_their_own_text(
    megalodon, length, streams, piece
):
    text = make_text(length)
    sizes = [len(part) for part in np.array_split(np.arange(length - 1), streams)]
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes).tolist()
    expected = literal_score(megalodon, text, starts)
    score = score_streams(megalodon, text, streams=streams, piece=piece, use_autocast=False)
    assert_same(score, expected)
    assert score.state_bytes == 2 * (8 + 2 * 4 * 8 + 16 * 2 * 2 * 4 + 8 * 24 * 4) + 8 + 64


def test_only_what_is_read_at_a_time_is_held(megalodon):
    class Recording:
        """A text of zeros that holds nothing."""

        longest = 0

        def __len__(self):
            return 30_001

        def __getitem__(self, where):
            start, stop, _ = where.indices(len(self))
            self.longest = max(self.longest, stop - start)
            return np.zeros(stop - start, dtype=np.uint8)

    text = Recording()
    score = score_streams(megalodon, text, streams=3, piece=1000, use_autocast=False)
    assert (score.predicted.sum(), text.longest) == (30_000, 1001)
    text = Recording()
    score = score_windows(megalodon, text, context=3000, stride=3000, use_autocast=False)
    assert (score.predicted.sum(), text.longest) == (30_000, 3001)


def test_scoring_leaves_the_model_training_and_the_generator_alone(make_tiny):
    model = build_model(make_tiny("megalodon", dropout=0.5)).train()
    before = torch.get_rng_state()
    text = make_text(100)
    results = [
        score_streams(model, text, streams=2, piece=9, use_autocast=True).loss for _ in range(2)
    ]
    assert results[0] == results[1]
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranges_part_the_distances():
    score = Score()
    score.add(torch.ones(2, 5000), 1)
    score.add(torch.zeros(3, 1), 2**40)
    rows = score.by_distance()
    assert [(row["from"], row["to"], row["predicted"]) for row in rows] == [
        (1, 32, 64),
        (33, 128, 192),
        (129, 512, 768),
        (513, 1024, 1024),
        (1025, 4096, 6144),
        (4097, 16384, 1808),
        (2**38 + 1, 2**40, 3),
    ]
    one = 1 / math.log(2)
    assert [row["bpc"] for row in rows] == pytest.approx([one] * 6 + [0.0])
    assert score.loss == 10_000 / 10_003
    assert rows[-1]["bpc_so_far"] == pytest.approx(score.loss * one)
