"""The loss on fixed text counts every byte once, however it is cut into batches."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megalodon_enwik8 import evaluation
from megalodon_enwik8.config import MODELS
from megalodon_enwik8.data import windows_at
from megalodon_enwik8.evaluation import main, score_windows
from megalodon_enwik8.models import build_model, byte_losses
from megalodon_enwik8.run_folder import read_metrics
from megalodon_enwik8.training import train

from .conftest import tiny
from .programs import refused, run


@pytest.fixture
def model(make_tiny, model_name):
    return build_model(make_tiny(model_name, attention_dropout=0.5)).train()


def test_fixed_windows_give_their_mean_in_batches_of_any_size(model, monkeypatch):
    text = np.random.default_rng(7).integers(256, size=90, dtype=np.uint8)
    starts = [0, 3, 30, 30, 65]
    model.eval()
    with torch.no_grad():
        each = [byte_losses(model, w[None]).mean().item() for w in windows_at(text, starts, 24)]
    for tokens in (1, 60, 8192):
        monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", tokens)
        score = score_windows(model, text, context=24, stride=24, starts=starts, use_autocast=False)
        assert score.loss == pytest.approx(np.mean(each))


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
