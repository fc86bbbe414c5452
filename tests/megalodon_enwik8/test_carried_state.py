"""Training with carried state is truncated backpropagation through time, resumed or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megalodon import MegalodonCache
from megalodon_enwik8 import training
from megalodon_enwik8.carried_state import CarriedState
from megalodon_enwik8.checkpoint import load_checkpoint, save_checkpoint
from megalodon_enwik8.data import load_corpus, stream_batch, stream_steps, training_batch
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.models import build_model, compile_layers, new_state
from megalodon_enwik8.run_folder import NEWEST, RunFolder
from megalodon_enwik8.training import make_optimizer, train, train_step

from .endings import ending


@given(
    streams=st.integers(1, 5),
    seq_len=st.integers(1, 9),
    length=st.integers(2, 300),
    seed=st.integers(0, 99),
)
def test_streams_go_on_where_they_ended_and_share_no_byte_to_predict(
    streams: int, seq_len: int, length: int, seed: int
) -> None:
    text = np.arange(length).astype(np.uint8)
    whole = np.arange(length)  # places, where bytes would repeat
    if length - 1 < streams * seq_len:
        with pytest.raises(UserError, match=f"need {streams * seq_len + 1} bytes, the training"):
            stream_batch(text, seed=seed, step=0, streams=streams, seq_len=seq_len)
        return
    steps = stream_steps(text, streams=streams, seq_len=seq_len)
    for number in range(2):
        pieces = []
        for place in range(steps):
            rows, begins = stream_batch(
                whole, seed=seed, step=number * steps + place, streams=streams, seq_len=seq_len
            )
            assert rows.shape == (streams, seq_len + 1)
            assert begins == (place == 0)
            if pieces:
                assert torch.equal(rows[:, 0], pieces[-1][:, -1])
            pieces.append(rows)
        predicted = torch.cat([rows[:, 1:] for rows in pieces], dim=1).flatten()
        # One stream after the other, without a gap; less than a step is left out.
        assert torch.equal(predicted, predicted[0] + torch.arange(len(predicted)))
        assert predicted[0] >= 1
        assert length - 1 - len(predicted) < streams * seq_len


@given(
    length=st.integers(1, 4),
    streams=st.integers(1, 5),
    seq_len=st.integers(1, 9),
    size=st.integers(2, 60),
    seed=st.integers(0, 99),
)
def test_short_streams_begin_anew_elsewhere(
    length: int, streams: int, seq_len: int, size: int, seed: int
) -> None:
    places = np.arange(size)

    def batch(step: int) -> tuple[torch.Tensor, bool]:
        return stream_batch(
            places, seed=seed, step=step, streams=streams, seq_len=seq_len, length=length
        )

    if size <= length * seq_len:
        with pytest.raises(UserError, match=f"carry_steps x seq_len={length * seq_len}: the"):
            batch(0)
        return
    for begin in (0, length):
        pieces = [batch(begin + place) for place in range(length)]
        assert [begins for _, begins in pieces] == [True] + [False] * (length - 1)
        whole = torch.cat([pieces[0][0][:, :1], *(rows[:, 1:] for rows, _ in pieces)], dim=1)
        assert torch.equal(whole, whole[:, :1] + torch.arange(length * seq_len + 1))
    if length == 1:
        expected = training_batch(places, seed=seed, step=3, batch_size=streams, seq_len=seq_len)
        assert torch.equal(batch(3)[0], expected)


def literal_training(config: Any, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Truncated backpropagation through time, written out: one stream after the other."""
    model = build_model(config).train()
    optimizer = make_optimizer(model, config)
    train_text = load_corpus(config.data_path, config.data_bytes).train
    caches = [MegalodonCache(model.config) for _ in range(config.sequences_per_step)]
    losses = []
    for step in range(steps):
        batch, begins = stream_batch(
            train_text,
            seed=config.seed,
            step=step,
            streams=config.sequences_per_step,
            seq_len=config.seq_len,
            length=config.carry_steps,
        )
        if begins:
            caches = [MegalodonCache(model.config) for _ in caches]
        loss = torch.zeros(())
        for row, cache in zip(batch, caches, strict=True):
            logits = model(row[None, :-1], cache=cache, use_cache=True).logits[0]
            loss = loss + F.cross_entropy(logits, row[1:])
        loss = loss / len(batch)
        loss.backward()
        for cache in caches:
            cache.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("seq_len", [16, 21], ids=["whole chunks", "parts of chunks"])
@pytest.mark.parametrize(
    ("checkpointing", "carry_steps"), [(False, None), (True, None), (False, 2)]
)
def test_carried_training_is_truncated_backpropagation_through_time(
    make_tiny: Any, seq_len: int, checkpointing: bool, carry_steps: int | None
) -> None:
    # 900 bytes are three steps: a pass ends within the run.
    streams = 900 // seq_len // 3
    config = make_tiny(
        "megalodon",
        carry_state=True,
        carry_steps=carry_steps,
        data_bytes=1000,
        seq_len=seq_len,
        batch_size=streams,
        grad_accum_every=1,
        num_batches=5,
        gradient_checkpointing=checkpointing,
    )
    losses, weights = literal_training(config, 5)
    assert train(config) == 0
    rows, trained = ending(config)
    assert [row["train_loss"] for row in rows[:-1]] == pytest.approx(losses, abs=1e-5)
    for name, weight in weights.items():
        # Five steps of 3e-3; only the order of summation differs.
        torch.testing.assert_close(trained[name], weight.data, rtol=0, atol=1e-5, msg=name)


def test_the_split_into_micro_batches_changes_nothing(make_tiny: Any, tmp_path: Path) -> None:
    endings = []
    for size in (1, 3, 6):
        config = make_tiny(
            "megalodon",
            carry_state=True,
            batch_size=size,
            grad_accum_every=6 // size,
            run_dir=str(tmp_path / str(size)),
        )
        assert train(config) == 0
        endings.append(ending(config)[1])
    for result in endings[1:]:
        for name, weight in result.items():
            torch.testing.assert_close(weight, endings[0][name], rtol=0, atol=1e-5, msg=name)


class Crash(Exception):
    pass


def test_a_crash_in_any_step_changes_nothing_of_the_ending(
    make_tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 3 steps of 20 bytes a pass, checkpoints after 2 and 4: within a pass, and in the second one.
    options = {"carry_state": True, "seq_len": 20, "batch_size": 5, "grad_accum_every": 3}
    options |= {"data_bytes": 1050}
    options |= {"num_batches": 5, "dropout": 0.2, "use_autocast": True}
    whole = make_tiny("megalodon", **options)
    assert train(whole) == 0
    log = RunFolder.log
    for crash in (1, 2, 3, 4):
        config = make_tiny("megalodon", **options, run_dir=str(tmp_path / str(crash)))

        def crashing(self: RunFolder, row: dict[str, Any], crash: int = crash) -> None:
            if row["step"] == crash:
                raise Crash
            log(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "log", crashing)
            with pytest.raises(Crash):
                train(config)
        assert train(config, resume=NEWEST) == 0
        rows, weights = ending(config)
        assert rows == ending(whole)[0]
        for name, weight in ending(whole)[1].items():
            assert torch.equal(weights[name], weight), name


def test_resuming_may_split_the_streams_another_way(make_tiny: Any, tmp_path: Path) -> None:
    whole = make_tiny("megalodon", carry_state=True)
    assert train(whole) == 0
    half = make_tiny("megalodon", carry_state=True, run_dir=str(tmp_path / "half"), num_batches=4)
    assert train(half) == 0
    split = {"batch_size": 1, "grad_accum_every": 4}
    config = make_tiny("megalodon", carry_state=True, run_dir=half.run_dir, **split)
    assert train(config, resume=NEWEST) == 0
    for name, weight in ending(whole)[1].items():
        # Only the order of summation differs, for two steps of 3e-3.
        torch.testing.assert_close(ending(config)[1][name], weight, rtol=0, atol=1e-5)


def test_a_skipped_step_leaves_no_trace_in_the_states(make_tiny: Any) -> None:
    """A state that met an infinite loss would spoil every later step."""
    config = make_tiny("megalodon", carry_state=True, on_nonfinite="skip")

    real, calls = training.train_step, []

    def spoiling(*arguments: Any) -> tuple[float, float]:
        result = real(*arguments)
        calls.append([cache.positions for cache in arguments[4]])
        if len(calls) == 3:
            for cache in arguments[4]:
                cache.map(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t)
            return float("nan"), float("nan")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", spoiling)
        assert train(config) == 0
    assert calls == [[24] * 2, [48] * 2, [72] * 2, [24] * 2, [48] * 2, [72] * 2]
    losses = [row["train_loss"] for row in ending(config)[0][:-1]]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]


def test_a_carried_state_comes_back_from_a_file_bit_for_bit(make_tiny: Any, tmp_path: Path) -> None:
    config = make_tiny("megalodon", carry_state=True, batch_size=2, grad_accum_every=2)
    assert train(config) == 0
    path = Path(config.run_dir) / "checkpoint_00000006.pt"
    checkpoint = load_checkpoint(path)
    model = build_model(config)
    carried = CarriedState(model, 4, 2)
    carried.load_state_dict(checkpoint.carried_state)
    assert [cache.positions for cache in carried.caches] == [144, 144]
    again = carried.state_dict()
    for tensor, before in zip(again["tensors"], checkpoint.carried_state["tensors"], strict=True):
        assert torch.equal(tensor, before)
    assert load_checkpoint(Path(config.run_dir) / "final.pt").carried_state is None
    # Saved where a pass begins, there is nothing to carry.
    carried.begin()
    carried.load_state_dict(carried.state_dict())
    assert [cache.positions for cache in carried.caches] == [0, 0]


def spoil_states(state: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """States that do not fit, and what is said of each."""
    none = "this is not the state of a MegalodonCache"
    damaged = "this state is damaged: "
    tensors = state["tensors"]
    yield {}, none
    yield None, none
    yield {"tensors": tensors}, none
    yield state | {"signature": {}}, "this state is of another model: "
    for wrong in (None, 7, {"num_layers": torch.ones(2)}):
        yield state | {"signature": wrong}, damaged + "its signature"
    yield state | {"tensors": [t[:2] for t in tensors]}, "it holds 2 streams, this run has 4"
    for wrong in (None, -1, 1.5, True, "1"):
        yield state | {"positions": wrong}, damaged + "its counts"
    yield state | {"uniform_length": "1"}, damaged + "its counts"
    for wrong in (None, 7, {}, tuple(tensors), [*tensors[:-1], None]):
        yield state | {"tensors": wrong}, damaged + "it holds no list of tensors"
    for wrong in (tensors[:-1], [*tensors[:-1], tensors[-1][0]], [t[0] for t in tensors]):
        yield state | {"tensors": wrong}, damaged + "its tensors have the wrong shapes"
    for wrong in (
        [t.double() for t in tensors],
        [t.long() for t in tensors],
        [*tensors[:-1], tensors[-1].bool()],
    ):
        yield state | {"tensors": wrong}, damaged + "its tensors have the wrong types"


def test_a_carried_state_that_does_not_fit_is_refused(make_tiny: Any) -> None:
    config = make_tiny("megalodon", carry_state=True)
    assert train(config) == 0
    path = Path(config.run_dir) / "checkpoint_00000006.pt"
    checkpoint = load_checkpoint(path)
    for state, line in spoil_states(checkpoint.carried_state):
        with pytest.raises(ValueError, match=line):
            CarriedState(build_model(config), 4, 2).load_state_dict(state or {})
    save_checkpoint(path, replace(checkpoint, carried_state=None))
    line = "its carried state does not fit: this is not the state of a MegalodonCache"
    with pytest.raises(UserError, match=line):
        train(make_tiny("megalodon", carry_state=True, num_batches=8), resume=path)


def test_the_key_is_refused_where_it_cannot_work(make_tiny: Any) -> None:
    with pytest.raises(ValueError, match="carry_state=true: is a key of model: megalodon, but"):
        make_tiny("llama", carry_state=True)
    with pytest.raises(UserError, match="carry_state=true: 12 streams of seq_len=1500 need 18001"):
        train(make_tiny("megalodon", carry_state=True, seq_len=1500, batch_size=6))
    with pytest.raises(ValueError, match="carry_steps=2: only a run with carry_state: true"):
        make_tiny("megalodon", carry_steps=2)
    with pytest.raises(UserError, match="carry_steps x seq_len=19200: the training part has 18000"):
        train(make_tiny("megalodon", carry_state=True, carry_steps=800))
    config = make_tiny("megalodon", carry_state=True, seq_len=20, compile=True)
    with pytest.raises(UserError, match="make seq_len=20 a multiple of chunk_size=8"):
        compile_layers(build_model(config), config, steps=1)


@pytest.mark.slow  # compiles a layer twice: without a state, and with one
def test_compiled_layers_carry_the_state(make_tiny: Any, tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        config = make_tiny(
            "megalodon", carry_state=True, compile=compiled, run_dir=str(tmp_path / str(compiled))
        )
        assert train(config) == 0
        results.append(ending(config)[1])
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-4, msg=name)


def test_a_step_hands_each_micro_batch_its_own_rows(make_tiny: Any) -> None:
    config = make_tiny("megalodon", batch_size=2, grad_accum_every=2)
    model = build_model(config).train()
    states = [new_state(model, truncated=True) for _ in range(2)]
    optimizer = make_optimizer(model, config)
    batch = torch.randint(256, (4, 25), generator=torch.Generator().manual_seed(7))
    train_step(model, optimizer, batch, config, states)
    for state, rows in zip(states, batch.split(2), strict=True):
        cut_off = [*state.states[0].norm, state.states[0].cema, *state.final_norm]
        assert not any(tensor.requires_grad for tensor in cut_off)
        fresh = new_state(build_model(config))
        build_model(config)(rows[:, :-1], cache=fresh)
        for tensor, expected in zip(
            state.state_dict()["tensors"], fresh.state_dict()["tensors"], strict=True
        ):
            torch.testing.assert_close(tensor, expected)
