"""Tiny experiments: a text, and configs of both models that train in milliseconds a step."""

import json
import multiprocessing
import random

import pytest

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.run_folder import RunFolder

from .endings import Crash

TINY = {
    "llama": {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8},
    "megalodon": {
        "model_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "z_dim": 8,
        "value_dim": 16,
        "ffn_hidden_dim": 32,
        "cema_ndim": 2,
        "chunk_size": 8,
        "norm_num_groups": 4,
    },
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("FORCE_DEVICE", "cpu")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """20,000 bytes of words in a fixed random order."""
    words = ["the", "state", "of", "a", "text", "is", "read", "once", "and", "kept", "世\n", "é"]
    text = " ".join(random.Random(7).choices(words, k=6000)).encode()[:20_000]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_bytes(text)
    return path


@pytest.fixture(params=["llama", "megalodon"])
def model_name(request):
    return str(request.param)


def tiny(model, run_dir, text, /, **changes):
    values = {
        "model": model,
        "run_dir": str(run_dir),
        "data_path": str(text),
        "seq_len": 24,
        "num_batches": 6,
        "batch_size": 2,
        "grad_accum_every": 2,
        "learning_rate": 3e-3,
        "use_autocast": False,
        "compile": False,
        "validate_every": 2,
        "val_batches": 4,
        "full_validation": False,
        "save_every": 2,
        "generate_every": 0,
        "generate_prompt_len": 8,
        "generate_length": 8,
    }
    return ExperimentConfig(**{**values, **TINY[model], **changes})


@pytest.fixture
def make_tiny(tmp_path, text_file):
    """make_tiny(model_name, **changes): a config whose folder lies in tmp_path."""
    return lambda model_name, **changes: tiny(model_name, tmp_path / "run", text_file, **changes)


@pytest.fixture
def crash_in_step(monkeypatch):
    """crash_in_step(n): die while step n's line is being written, this once."""

    def arrange(step):
        log = RunFolder.log

        def crashing(self, row):
            if row["step"] == step:
                monkeypatch.setattr(RunFolder, "log", log)
                with self.file("metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row)[:40])
                raise Crash
            log(self, row)

        monkeypatch.setattr(RunFolder, "log", crashing)

    return arrange


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megalodon_enwik8.training"])
    return context
