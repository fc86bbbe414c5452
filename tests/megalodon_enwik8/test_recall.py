"""The recall probe asks what it says, of both models alike, and loses nothing."""

import json

import pytest
import torch

from megalodon_enwik8 import recall
from megalodon_enwik8.models import build_model, count_parameters
from megalodon_enwik8.recall import ANSWERS, CHUNK, GAPS, KEYS, OTHERS, PAIRS, VALUES, draw
from megalodon_enwik8.report.pictures import draw_recall
from megalodon_enwik8.safety import UserError


@pytest.mark.parametrize("gap", GAPS)
def test_each_key_comes_back_with_its_value(gap):
    batch = draw(3, gap, seed=1)
    assert batch.shape == (3, 4 * PAIRS + gap)
    for row in batch.tolist():
        first, others, again = row[: 2 * PAIRS], row[2 * PAIRS : -2 * PAIRS], row[-2 * PAIRS :]
        pairs = dict(zip(first[::2], first[1::2], strict=True))
        assert len(pairs) == PAIRS
        assert dict(zip(again[::2], again[1::2], strict=True)) == pairs
        assert all(key < KEYS <= value < KEYS + VALUES for key, value in pairs.items())
        assert all(KEYS + VALUES <= t < KEYS + VALUES + OTHERS for t in others)
        assert row[ANSWERS] == again[1::2] == row[1:][ANSWERS]


@pytest.mark.parametrize(("gap", "borders"), GAPS.items())
def test_gaps_cross_as_many_borders_as_they_say(gap, borders):
    """From any key to its return."""
    first = (0, 2 * PAIRS - 2)
    again = (2 * PAIRS + gap, 4 * PAIRS + gap - 1)
    crossed = {b // CHUNK - a // CHUNK for a in first for b in again}
    assert crossed == {borders}


def test_sequences_are_a_function_of_the_seed():
    assert torch.equal(draw(4, 16, seed=1), draw(4, 16, seed=1))
    assert not torch.equal(draw(4, 16, seed=1), draw(4, 16, seed=2))


def test_both_models_have_as_many_parameters():
    ours, theirs = (
        count_parameters(build_model(recall.config_of(model, 1e-3, 7, 10)))
        for model in ("megalodon", "llama")
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_longer_gaps_come_in_one_after_the_other():
    gaps = [recall.gap_of(step, 1000) for step in range(1000)]
    assert [gaps.index(gap) for gap in GAPS] == [0, 121, 242, 363, 484]
    assert set(gaps[600:]) == set(GAPS)


def test_a_key_is_for_the_models_that_have_it(tmp_path, monkeypatch):
    out = tmp_path / "recall.jsonl"
    monkeypatch.setattr(recall, "RATES", (1e-3,))
    monkeypatch.setattr(recall, "TEST_SEQUENCES", 4)
    given = ["norm_num_groups=8", "--steps", "1", "--sequences", "2", "--seeds", "7"]
    assert recall.main([str(out), *given]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"] for row in rows} == {"megalodon"}
    assert rows[0]["given"] == {"norm_num_groups": 8}
    with pytest.raises(UserError, match="command line: norm_num_group: unknown key"):
        recall.main([str(out), "norm_num_group=8"])
    with pytest.raises(UserError, match="command line: no model has dim and z_dim: give one"):
        recall.main([str(out), "--steps", "1", "dim=64", "z_dim=64"])


@pytest.mark.parametrize("key", ["use_autocast=true", "compile=true", "chunk_size=16", "seed=1"])
def test_a_key_that_says_nothing_to_the_probe_is_refused(key, tmp_path):
    with pytest.raises(UserError, match=f"{key.partition('=')[0]}: is not for the probe; leave"):
        recall.main([str(tmp_path / "recall.jsonl"), key])


def test_a_probe_goes_on_and_is_drawn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "recall.jsonl"
    monkeypatch.setattr(recall, "RATES", (1e-3,))
    monkeypatch.setattr(recall, "TEST_SEQUENCES", 4)
    for seeds in (["7"], ["7", "8"]):
        assert recall.main([str(out), "--steps", "2", "--sequences", "2", "--seeds", *seeds]) == 0
        assert capsys.readouterr().out.count("right after a gap of") == 2  # of the new seed alone
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["seed"]) for row in rows] == [
        (model, seed) for seed in (7, 8) for model in ("megalodon", "llama")
    ]
    for row in rows:
        assert list(row["accuracy"]) == [str(gap) for gap in GAPS]
        assert all(0 <= share <= 1 for share in row["accuracy"].values())
    thin_and_thick = 2 * (2 + 1) + 1  # and the dotted one
    assert len(draw_recall(rows).axes[0].get_lines()) == thin_and_thick
    out.write_text("not JSON")
    with pytest.raises(UserError, match="is not what this writes; name another file"):
        recall.main([str(out)])
