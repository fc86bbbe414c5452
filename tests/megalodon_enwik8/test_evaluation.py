"""Every byte of a text is predicted once, from the bytes that it should be, and no other."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalodon_enwik8 import evaluation
from megalodon_enwik8.config import MODELS
from megalodon_enwik8.data import windows_at
from megalodon_enwik8.evaluation import RANGE_ENDS, Score, main, score_streams, score_windows
from megalodon_enwik8.models import build_model, byte_losses
from megalodon_enwik8.run_folder import read_metrics
from megalodon_enwik8.training import train

from .conftest import tiny
from .programs import refused, run


def make_text(length):
    return np.random.default_rng(7).integers(256, size=length, dtype=np.uint8)


@pytest.fixture
def model(make_tiny, model_name):
    return build_model(make_tiny(model_name)).eval()


def test_fixed_windows_give_their_mean_in_batches_of_any_size(model, monkeypatch):
    text, starts = make_text(90), [0, 3, 30, 30, 65]
    with torch.no_grad():
        each = [byte_losses(model, w[None]).mean().item() for w in windows_at(text, starts, 24)]
    for tokens in (1, 60, 8192):
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens)
        score = score_windows(model, text, context=24, stride=24, starts=starts, use_autocast=False)
        assert score.loss == pytest.approx(np.mean(each))


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
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """Weights of either model after one step."""
    paths = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        assert train(tiny(name, folder, text_file, num_batches=1, full_validation=True)) == 0
        paths[name] = folder / "final.pt"
    return paths


@pytest.mark.parametrize("name", MODELS)
def test_without_options_the_figure_is_that_of_the_training(trained, name, capfd):
    path = trained[name]
    assert run(main, path) == 0
    rows = read_metrics(path.with_name("metrics.jsonl"))
    result = json.loads(path.with_name("final-words.txt-val-context24-stride24.json").read_text())
    assert result["loss"] == pytest.approx(rows[-1]["full_val_loss"], rel=1e-6)
    assert result["bpc"] == pytest.approx(result["loss"] / math.log(2))
    assert result["predicted"] == sum(row["predicted"] for row in result["by_distance"]) == 1999
    assert (result["trained_on_this_corpus"], result["split"]) == (True, "val")
    assert f"bpc: {result['bpc']}" in capfd.readouterr().out


def test_figures_go_where_they_are_asked_to(trained, tmp_path, capfd):
    other = tmp_path / "other.txt"
    other.write_bytes(b"another text " * 100)
    windows, stream = tmp_path / "w.json", tmp_path / "s.json"
    text = ("--data-path", other, "--data-bytes", 1000, "--split", "train")
    assert (
        run(main, trained["llama"], "--context", 100, "--stride", 10, *text, "--out", windows) == 0
    )
    options = ("--stream", "--streams", 4, "--piece", 9)
    assert run(main, trained["megalodon"], *options, *text, "--out", stream) == 0
    assert "state_bytes: 2" in capfd.readouterr().out
    for path in (windows, stream):
        result = json.loads(path.read_text())
        assert (result["corpus"], result["predicted"]) == ("other.txt", 899)
        assert result["trained_on_this_corpus"] is False
    assert json.loads(stream.read_text())["reading"] == {"streams": 4, "piece": 9}
    assert run(main, trained["megalodon"], "--stream", *text, "--out", stream) == 0
    assert json.loads(stream.read_text())["reading"] == {"streams": 1, "piece": 8192}


def test_figures_of_other_texts_do_not_take_the_place_of_each_other(trained, tmp_path):
    found = [tmp_path / folder / "text.txt" for folder in ("one", "two")]
    for path in found:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode() * 200)
    folder = trained["llama"].parent
    for given in ([found[0]], [found[1]], [found[0], "--data-bytes", 300]):
        assert run(main, trained["llama"], "--data-path", *given) == 0
    assert len(list(folder.glob("final-text.txt-*-val-context24-stride24.json"))) == 3


def test_what_the_evaluation_refuses_is_one_line(trained, tmp_path, capfd):
    (tmp_path / "two").write_bytes(b"abcdefghij")
    megalodon, llama = trained["megalodon"], trained["llama"]
    cases = {
        (): "the following arguments are required: checkpoint",
        (tmp_path / "none.pt",): "none.pt: no such checkpoint",
        (llama, "--context", 0): "argument --context: '0' is not a whole number >= 1",
        (llama, "--context", 9, "--stride", 10): "--stride 10: must be at most --context 9",
        (llama, "--stream"): "a Llama has no state of fixed size to carry: its memory "
        "of a text grows with every byte; give it windows of the text, as --context N does",
        (megalodon, "--stream", "--context", 9): "--stream has no --context and no --stride",
        (megalodon, "--piece", 9): "--streams and --piece are for --stream: add it",
        (megalodon, "--stream", "--streams", 2000): "the val split has 2000 bytes: too few",
        (megalodon, "--stream", "--streams", 0): "'0' is not a whole number >= 1",
        (megalodon, "--data-path", tmp_path / "two"): "val split has 1 bytes: too few",
        (megalodon, "--data-path", tmp_path / "no"): "no: no such file",
        (megalodon, "--data-bytes", 9): "--data-bytes is for --data-path",
        (megalodon, "--out", megalodon): "the figures are JSON: name a file that ends in .json",
    }
    for arguments, line in cases.items():
        assert line in refused(capfd, main, *arguments), arguments
    assert run(main, megalodon, "--out", tmp_path / "two" / "x.json") == 2  # a file, no folder
    said = capfd.readouterr()
    assert "Not a directory" in said.err or "File exists" in said.err
    assert "bpc" not in said.out  # known before the text was read


@pytest.mark.slow  # reads 11 MB
def test_streaming_takes_the_same_memory_for_ten_times_the_text(trained, tmp_path):
    peaks = []
    for size in (1_000_000, 10_000_000):
        path, out = tmp_path / "text", tmp_path / "out.json"
        path.write_bytes(np.random.default_rng(7).bytes(size))
        options = ["--stream", "--streams", "64", "--split", "train", "--out", out]
        command = [sys.executable, "-m", "megalodon_enwik8.evaluation", trained["megalodon"]]
        command += [*options, "--data-path", path]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        peaks.append(json.loads(out.read_text())["peak_memory_bytes"])
    assert peaks[1] < 1.05 * peaks[0]
