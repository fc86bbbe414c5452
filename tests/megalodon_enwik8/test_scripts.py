"""train.py and inference.py from their command lines."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import inference
import train
from megalodon_enwik8.training import train as run_training

from .programs import refused, run

ROOT = Path(__file__).parents[2]


def write_config(path, config):
    path.write_text(config.to_yaml())
    return path


@pytest.fixture
def trained(make_tiny, model_name):
    """A run folder of either model."""
    config = make_tiny(model_name, num_batches=2)
    assert run_training(config) == 0
    return Path(config.run_dir)


@pytest.mark.filterwarnings("error")
def test_train_reads_the_file_and_the_overrides_in_any_order(make_tiny, tmp_path, capfd):
    path = write_config(tmp_path / "x.yaml", make_tiny("megalodon"))
    assert run(train.main, "num_batches=1", "--config", path, "seed=9") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"^model: megalodon$", out, re.M)
    assert "step 1: validation loss" in out
    assert run(train.main, "--config", path, "--resume", "num_batches=2", "seed=9") == 0
    assert "step 2: validation loss" in capfd.readouterr().out
    assert run(train.main, "--config", path, "--overwrite", "num_batches=1") == 0


def test_what_train_refuses_is_one_line(make_tiny, tmp_path, text_file, capfd):
    path = write_config(tmp_path / "x.yaml", make_tiny("llama"))
    cases = {
        (): "--config; see ",
        ("--config", tmp_path / "none.yaml"): "none.yaml: No such file or directory: check",
        ("--config", tmp_path): "Is a directory: mend that",
        ("--config", path, "nonsense"): "expected key=value",
        ("--config", path, "data_path=/no/such"): "/no/such",
        ("--config", path, "seq_len=100000"): "seq_len",
        ("--config", path, "--resume", "--overwrite"): "give one of them",
        ("--config", path, "--resume", "none.pt"): "none.pt: no such checkpoint",
        ("--config", path, "--resume", text_file): "truncated, damaged, of another version or not",
        ("--config", path, "--verbose"): "unrecognized arguments: --verbose",
    }
    for arguments, line in cases.items():
        assert line in refused(capfd, train.main, *arguments), arguments


def test_running_out_of_memory_says_what_to_lower(make_tiny, tmp_path, capfd):
    config = make_tiny("llama", num_tokens=2**20, dim=2**20, heads=1)  # an embedding of terabytes
    path = write_config(tmp_path / "x.yaml", config)
    assert "out of memory: lower batch_size and" in refused(capfd, train.main, "--config", path)


PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_train_at_their_width(tmp_path, text_file, capfd, path):
    overrides = (
        f"run_dir={tmp_path / 'run'}",
        f"data_path={text_file}",
        "num_layers=1" if "megalodon" in path.stem else "depth=1",
        "num_batches=2",
        "batch_size=1",
        "grad_accum_every=1",
        "val_batches=1",
        "full_validation=false",
        "generate_length=4",
        "use_autocast=false",
        "seq_len=64",
    )
    assert run(train.main, "--config", path, *overrides) == 0
    assert "step 2: validation loss" in capfd.readouterr().out


def test_an_open_seed_is_drawn_said_stored_and_kept_on_resume(make_tiny, tmp_path, capfd):
    path = write_config(tmp_path / "x.yaml", make_tiny("llama"))
    path.write_text(path.read_text().replace("seed: 7", "seed: null"))
    assert run(train.main, "--config", path, "num_batches=2") == 0
    said = re.search(r"seed=(\d+): drawn", capfd.readouterr().out)
    assert said is not None
    stored = tmp_path / "run" / "config.yaml"
    assert f"seed: {said[1]}\n" in stored.read_text()
    assert run(train.main, "--config", path, "num_batches=4", "--resume") == 0
    assert f"seed={said[1]}: drawn" in capfd.readouterr().out
    assert f"seed: {said[1]}\n" in stored.read_text()
    assert run(train.main, "--config", path, "num_batches=2", f"run_dir={tmp_path / 'other'}") == 0
    assert f"seed={said[1]}:" not in capfd.readouterr().out


def stdin_is(path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None if path is None else path.open())


def test_inference_prints_the_prompt_and_the_text_and_its_speed(
    trained, capfd, tmp_path, monkeypatch
):
    prompt = "Größe: "
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    weights = trained / "final.pt"
    outputs = []
    zipped = tmp_path / "prompt.gz"
    zipped.write_bytes(gzip.compress((prompt + "and more").encode()))
    for source in (
        ("--prompt", prompt),
        ("--prompt-file", tmp_path / "prompt.txt"),
        ("--prompt-gzip", zipped, "--prompt-len", "9"),
        (),
    ):
        stdin_is(tmp_path / "prompt.txt", monkeypatch)
        assert run(inference.main, weights, *source, "--max-length", "30", "--seed", "3") == 0
        out, err = capfd.readouterr()
        assert out.startswith(prompt)
        assert len(out) > len(prompt) + 10
        assert re.fullmatch(
            r"30 bytes after a prompt of 9 in [\d.]+ s: [\d.]+ tokens per second\n", err
        )
        outputs.append(out)
    assert outputs == outputs[:1] * 4
    assert run(inference.main, weights, "--prompt", prompt, "--max-length", "30") == 0
    assert capfd.readouterr().out != outputs[0]


def test_without_a_prompt_inference_takes_its_own(trained, capfd, monkeypatch):
    for stdin in (None, Path(os.devnull)):
        stdin_is(stdin, monkeypatch)
        assert run(inference.main, trained / "checkpoint_00000002.pt", "--max-length", "4") == 0
        assert capfd.readouterr().out.startswith(inference.DEFAULT_PROMPT.decode())
    # The fact stands in an earlier chunk of 256 than what is written.
    fact = inference.DEFAULT_PROMPT.index(b"KOBALT")
    assert fact < 256 < len(inference.DEFAULT_PROMPT) - 1


def test_what_inference_refuses_is_one_line(make_tiny, tmp_path, capfd, monkeypatch):
    config = make_tiny("llama", num_batches=1)
    assert run_training(config) == 0
    weights = Path(config.run_dir) / "final.pt"
    cut = tmp_path / "cut.pt"
    cut.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "empty").touch()
    short = tmp_path / "short.gz"
    short.write_bytes(gzip.compress(bytes(99))[:-12])
    p = ("--prompt", "x")
    cases = {
        (): "required: checkpoint",
        (weights, "--prompt", ""): "the prompt from --prompt is empty",
        (weights, "--prompt-file", tmp_path / "empty"): "empty is empty: give at least one byte",
        (weights, "--prompt-file", tmp_path / "none"): "none: No such file or directory: check",
        (weights, "--prompt-file", tmp_path): "Is a directory: mend",
        (weights, *p, "--prompt-file", cut): "not allowed with",
        (weights, *p, "--prompt-len", "9"): "--prompt-len says how much of --prompt-gzip is read",
        (weights, "--prompt-gzip", tmp_path / "none"): "none: No such file or directory: check",
        (weights, "--prompt-gzip", cut): "cut.pt: cannot be read: Not a gzipped file",
        (weights, "--prompt-gzip", short): "short.gz: cannot be read: Compressed file ended",
        (weights.parent, *p): "no such checkpoint; ",
        (tmp_path / "none.pt", *p): "none.pt: no such checkpoint",
        (cut, *p): "cut.pt: truncated, damaged, of another version or not",
        (weights, *p, "--temperature", "-1"): "--temperature: '-1' is not a number >= 0",
        (weights, *p, "--temperature", "nan"): "'nan' is not a number >= 0",
        (weights, *p, "--min-p", "1.5"): "'1.5' is not a number >= 0, <= 1",
        (weights, *p, "--top-k", "0"): "'0' is not a whole number >= 1",
        (weights, *p, "--max-length", "0"): "'0' is not a whole number >= 1",
        (weights, *p, "--max-length", "many"): "'many' is not a whole number >= 1",
        (weights, *p, "--seed", "-1"): "'-1' is not a whole number >= 0",
    }
    for arguments, line in cases.items():
        assert line in refused(capfd, inference.main, *arguments), arguments


def test_the_scripts_run_as_programs(make_tiny, tmp_path, monkeypatch):
    """One real process each: text reaches a pipe in UTF-8 whatever the locale says."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    config = make_tiny("megalodon", num_batches=1)
    assert run_training(config) == 0
    path = write_config(tmp_path / "x.yaml", config)
    says = "from megalodon_enwik8.safety import run_main; run_main(lambda: print('\\u2013'))"
    done = subprocess.run([sys.executable, "-c", says], cwd=ROOT, capture_output=True)
    assert (done.stdout, done.stderr) == ("–\n".encode(), b"")

    def script(name, *arguments):
        command = [sys.executable, ROOT / name, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)

    done = script(
        "inference.py", tmp_path / "run" / "final.pt", "--prompt", "é", "--max-length", "9"
    )
    assert done.returncode == 0
    assert done.stdout.decode("utf-8").startswith("é")
    assert done.stderr.startswith(b"9 bytes after a prompt of 2 in ")
    done = script("train.py", "--config", path, "sead=1")
    assert (done.returncode, done.stdout) == (2, b"")
    says = f"error: {path} and command line: sead: unknown key; did you mean seed?\n"
    assert done.stderr == says.encode()
