"""The step, and what a run leaves behind."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from megalodon_enwik8 import training
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.models import build_model, byte_losses
from megalodon_enwik8.run_folder import NEWEST, read_metrics
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import derive_seed, make_optimizer, train, train_step


def test_the_commit_is_that_of_this_code_and_of_nothing_around_it(monkeypatch, tmp_path):
    file = tmp_path / "training.py"
    file.touch()
    monkeypatch.setattr(training, "__file__", str(file))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in ("init -q", "commit -q --allow-empty -m x"):
        subprocess.run([*git, *arguments.split()], check=True)
    assert training._commit() is None
    for arguments in ("add training.py", "commit -q -m x"):
        subprocess.run([*git, *arguments.split()], check=True)
    found = training._commit()
    assert re.fullmatch("[0-9a-f]{40}", found)
    file.write_text("changed")
    assert training._commit() == found + "+"


def steps(config, batches):
    """The weights after one step on each of `batches`."""
    model = build_model(config).train()
    optimizer = make_optimizer(model, config)
    for batch in batches:
        train_step(model, optimizer, batch, config)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_the_split_into_micro_batches_changes_no_weight(make_tiny, model_name):
    batches = torch.randint(256, (3, 16, 25), generator=torch.Generator().manual_seed(7))
    results = [
        steps(make_tiny(model_name, batch_size=size, grad_accum_every=16 // size), batches)
        for size in (16, 4, 1)
    ]
    for result in results[1:]:
        for name, weight in result.items():
            # Three steps of 3e-3; only the order of summation differs.
            torch.testing.assert_close(weight, results[0][name], rtol=0, atol=1e-5, msg=name)


def test_the_gradient_is_that_of_the_mean_over_the_whole_batch(make_tiny):
    config = make_tiny("llama", batch_size=1, grad_accum_every=4)
    batch = torch.randint(256, (4, 25))
    model = build_model(config).train()
    (byte_losses(model, batch).sum() / (4 * 24)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    model.zero_grad()
    loss, norm = train_step(model, make_optimizer(model, config), batch, config)
    assert norm == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(math.log(256), abs=0.2)


def test_adamw_decays_matrices_and_the_embedding_alone(make_tiny, model_name):
    config = make_tiny(model_name, optimizer="adamw", weight_decay=0.5, learning_rate=0.1)
    model = build_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # q_proj, w1, embed_tokens and the like; no norm, bias or coefficient of CEMA.
    assert decayed == {
        name
        for name in before
        if re.search(r"(proj|embed_tokens|lm_head|\.w(z|v|r|h1|h2|1|2|3))\.weight$", name)
    }
    for name in decayed:
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * 0.95)


def test_beta2_is_that_of_the_config(make_tiny):
    for kind in ("adam", "adamw"):
        config = make_tiny("llama", optimizer=kind, beta2=0.9)
        groups = make_optimizer(build_model(config), config).param_groups
        assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_words_are_learned(make_tiny, model_name):
    config = make_tiny(model_name, num_batches=60, validate_every=60, use_autocast=True)
    assert train(config) == 0
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert rows[0]["val_loss"] > 5
    assert rows[-1]["val_loss"] < 3


def test_metrics_tell_every_step_once_and_the_end(make_tiny):
    config = make_tiny("megalodon", full_validation=True, generate_every=3)
    assert train(config) == 0
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 2, 4, 6]
    assert [row["step"] for row in rows if "sample" in row] == [3, 6]
    for row in rows:
        assert row["tokens"] == min(row["step"] + 1, 6) * 4 * 24
        assert row["peak_memory_bytes"] > 1e6
        if "val_loss" in row:
            assert row["val_bpc"] == pytest.approx(row["val_loss"] / math.log(2))
    for row in rows[:-1]:
        assert row["train_bpc"] == pytest.approx(row["train_loss"] / math.log(2))
        assert row["learning_rate"] == 3e-3
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert rows[-1]["full_val_bpc"] == pytest.approx(rows[-1]["full_val_loss"] / math.log(2))


def test_the_folder_tells_config_environment_and_weights(make_tiny, text_file):
    from megalodon_enwik8.config import load_config

    config = make_tiny("llama", keep_last=1, keep_best=True)
    assert train(config) == 0
    folder = Path(config.run_dir)
    assert load_config(folder / "config.yaml") == config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["corpus"]["train_bytes"] == 18_000
    assert environment["corpus"]["val_bytes"] == 2_000
    assert environment["sessions"][0]["torch"] == torch.__version__
    assert environment["sessions"][0]["processor"]
    assert [p.name for p in sorted(folder.glob("*.pt"))] == [
        "best.pt",
        "checkpoint_00000006.pt",
        "final.pt",
    ]
    final = load_checkpoint(folder / "final.pt")
    assert (final.step, final.optimizer_state) == (6, None)
    rows = read_metrics(folder / "metrics.jsonl")
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)
    assert load_checkpoint(folder / "best.pt").step == best[1]


def test_dropout_is_a_function_of_seed_and_step(make_tiny, model_name):
    losses = []
    for validate_every in (1, 5):
        config = make_tiny(model_name, attention_dropout=0.3, validate_every=validate_every)
        assert train(config, overwrite=True) == 0
        rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
        losses.append([row["train_loss"] for row in rows[:-1]])
    assert losses[0] == losses[1]


def test_derived_seeds_differ_by_seed_step_and_purpose():
    cases = {(seed, step, use) for seed in range(9) for step in range(99) for use in "ab"}
    seeds = {derive_seed(*case) for case in cases}
    assert len(seeds) == len(cases)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture
def nan_at_step_3(monkeypatch):
    """Replace the batch's loss of step 3 by nan, with its gradients."""
    counter = iter(range(1000))

    def poisoned(model, batch):
        loss = byte_losses(model, batch)
        return loss * math.nan if next(counter) // 2 == 3 else loss

    monkeypatch.setattr(training, "byte_losses", poisoned)


def assert_finite(path):
    checkpoint = load_checkpoint(path)
    for tensor in checkpoint.model_state.values():
        assert torch.isfinite(tensor).all()
    for state in (checkpoint.optimizer_state or {"state": {}})["state"].values():
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.usefixtures("nan_at_step_3")
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(make_tiny):
    config = make_tiny("llama", save_every=1)
    with pytest.raises(UserError, match=r"^step 3: loss nan, gradient norm nan: stopped.*=skip"):
        train(config)
    folder = Path(config.run_dir)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    checkpoints = sorted(folder.glob("*.pt"))
    assert checkpoints[-1].name == "checkpoint_00000003.pt"
    for path in checkpoints:
        assert_finite(path)


@pytest.mark.usefixtures("nan_at_step_3")
def test_a_skipped_step_is_counted_and_changes_no_weight(make_tiny):
    config = make_tiny("llama", save_every=1, on_nonfinite="skip")
    assert train(config) == 0
    folder = Path(config.run_dir)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1]
    assert rows[3]["train_loss"] is None
    before, after = (load_checkpoint(folder / f"checkpoint_0000000{n}.pt") for n in (3, 4))
    for name, weight in before.model_state.items():
        assert torch.equal(weight, after.model_state[name])
    assert_finite(folder / "checkpoint_00000006.pt")


@pytest.mark.usefixtures("nan_at_step_3")
def test_a_run_that_stopped_goes_on_with_steps_skipped(make_tiny):
    with pytest.raises(UserError, match="start again with a lower learning_rate, or resume with"):
        train(make_tiny("llama"))
    assert train(make_tiny("llama", on_nonfinite="skip"), resume=NEWEST) == 0


def test_a_validation_loss_that_is_not_finite_stops_the_run(make_tiny, monkeypatch):
    monkeypatch.setattr(training.Trainer, "score", lambda self, starts: math.inf)
    with pytest.raises(UserError, match=r"^step 0: validation loss inf: stopped"):
        train(make_tiny("llama", keep_best=True))


def test_weights_that_are_not_finite_reach_no_checkpoint(make_tiny):
    # So large a step leaves weights that overflow before any loss has shown it.
    config = make_tiny("llama", learning_rate=1e38, weight_decay=0, save_every=1, num_batches=3)
    with pytest.raises(UserError, match=r"^step \d: "):
        train(config)
    for path in Path(config.run_dir).glob("*.pt"):
        assert_finite(path)


@pytest.mark.parametrize("value", ["tpu", "cuda"])
def test_a_device_that_is_unknown_or_absent_is_refused(make_tiny, monkeypatch, value):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("FORCE_DEVICE", value)
    line = rf"^FORCE_DEVICE={value}: PyTorch .* finds no such device here; use cpu$"
    with pytest.raises(UserError, match=line):
        train(make_tiny("llama"))
