"""The report's figures follow from the runs, and what cannot be compared is refused by name."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.data import ENWIK8_DATA_BYTES, SAMPLE_SHA256, SAMPLE_SIZE, split_point
from megalodon_enwik8.errors import run_main
from megalodon_enwik8.report import BEGIN, END, main
from megalodon_enwik8.report_format import duration, interval, listed, signed, spread
from megalodon_enwik8.report_statistics import (
    Point,
    first_reach,
    loss_after,
    paired,
    summarize,
)

CORPORA = {"sample": (SAMPLE_SIZE, SAMPLE_SHA256), "enwik8": (ENWIK8_DATA_BYTES, "e" * 64)}
PARAMETERS = {"megalodon": 11_277_696, "llama": 12_489_600}
LOSS = {"megalodon": 1.40, "llama": 1.45}  # at the end, of seed 8
BYTES = 16 * 512  # in a step


def falling(end: float, steps: int) -> Callable[[int], float]:
    """A loss that falls from 5.6 to `end` along a curve."""
    return lambda step: end + (5.6 - end) * (1 - step / steps) ** 8


def make_run(
    folder: Path,
    model: str,
    seed: int,
    *,
    loss: Callable[[int], float] | None = None,
    step_seconds: float = 2.0,
    corpus: str = "sample",
    cut_at: int | None = None,
    environment: dict[str, Any] | None = None,
    end: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run folder as training writes it, but for the steps that tell the report nothing."""
    values = {"val_batches": 100, "batch_size": 4, "grad_accum_every": 4, **config}
    used = ExperimentConfig(
        model=model, seed=seed, run_dir=str(folder), data_path="sample", **values
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(used.to_yaml())
    size, sha256 = CORPORA.get(corpus, (1000, corpus * 8))
    sizes = {"train_bytes": split_point(size), "val_bytes": size - split_point(size)}
    session = {"device": "cpu (2 of 2 cores)", "threads": 2, "torch": "2.13.0", "commit": "c" * 40}
    facts = {
        "corpus": {"name": corpus, "sha256": sha256, **sizes},
        "parameters": PARAMETERS[model],
        "sessions": [{**session, **(environment or {})}],
    }
    (folder / "environment.json").write_text(json.dumps(facts))
    steps, per_step = used.num_batches, used.tokens_per_step
    loss = loss or falling(LOSS[model] + (seed - 8) * 0.01, steps)
    rows = []
    for step in range(0, steps if cut_at is None else cut_at, 50):
        row: dict[str, Any] = {"step": step, "train_loss": loss(step), "skipped_steps": 0}
        if step % 100 == 0:
            row["val_loss"] = loss(step)
        row["seconds"] = (step + 1) * step_seconds
        row["tokens_per_second"] = per_step / step_seconds
        row["peak_memory_bytes"] = (step + 1) * 2**20
        rows.append(row)
    if cut_at is None:
        whole = {
            "full_val_loss": loss(steps) + 0.1,
            "sample": f"A prompt, and {model}:\n~~~~ \x1b[2J",
        }
        last = {"step": steps, "val_loss": loss(steps), **whole, "seconds": steps * step_seconds}
        rows.append({**last, "peak_memory_bytes": 1200 * 2**20, **(end or {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_pair(folder: Path, seeds: tuple[int, ...] = (7, 8, 9), **options: Any) -> list[Path]:
    """Runs of both models with the settings of the protocol."""
    return [
        make_run(folder / f"{model}-{seed}", model, seed, **options)
        for model in ("megalodon", "llama")
        for seed in seeds
    ]


def line(start: float, end: float, steps: int = 1200) -> Callable[[int], float]:
    """A loss that falls in a straight line, on which interpolation is exact."""
    return lambda step: start + (end - start) * step / steps


def report(folder: Path, *arguments: object) -> str:
    """RESULTS.md of what lies in a folder."""
    out = folder / "RESULTS.md"
    assert main([*map(str, arguments or [folder / "runs"]), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the program says on its way out with code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main([str(argument) for argument in arguments]))
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def section(text: str, title: str) -> str:
    """What stands below a title, up to the next of its rank."""
    return re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]


def row(text: str, *start: str) -> list[str]:
    """The cells after the first ones of a table's only row that begins with `start`."""
    opening = f"| {' | '.join(start)} | "
    found = [each for each in text.splitlines() if each.startswith(opening)]
    assert len(found) == 1, (opening, found)
    return found[0].removeprefix(opening).removesuffix(" |").split(" | ")


# Statistics


def test_mean_spread_and_interval_are_those_of_students_t() -> None:
    three = summarize([1.0, 2.0, 3.0])
    assert (three.count, three.mean, three.deviation) == (3, 2.0, 1.0)
    assert three.half_width == pytest.approx(4.3027 / math.sqrt(3))
    assert (three.low, three.high) == (2 - three.half_width, 2 + three.half_width)
    two = summarize([1.0, 1.2])
    assert two.half_width == pytest.approx(12.7062 * 0.1)  # s / sqrt(2) = 0.1
    many = summarize([0.0, 1.0] * 50)  # beyond the table: that of 30, never too narrow
    assert many.half_width == pytest.approx(2.0423 * many.deviation / 10)
    one = summarize([5.0])
    assert one.mean == 5.0
    assert math.isnan(one.half_width)
    assert one.sign == 0


def test_differences_are_taken_seed_by_seed() -> None:
    gap = paired({8: 2.0, 7: 1.0}, {7: 1.5, 8: 2.7})
    assert (gap.mean, gap.count) == (pytest.approx(-0.6), 2)
    assert gap.deviation == pytest.approx(0.1 * math.sqrt(2))


@given(st.floats(-9, 9), st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_the_sign_of_an_interval_says_on_which_side_of_zero_it_lies(
    shift: float, values: list[float]
) -> None:
    summary = summarize([shift + value for value in values])
    assert summary.low <= summary.mean <= summary.high
    assert summary.sign == (summary.low > 0) - (summary.high < 0)
    assert summary.touches(summary)
    opposite = summarize([-shift - value for value in values])
    assert opposite.sign == -summary.sign


curves = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.1, 1e4), st.floats(0.5, 8)), min_size=1, max_size=9
)


@given(curves, st.floats(0.5, 8), st.floats(0, 1))
def test_a_curve_is_read_on_the_straight_lines_between_its_points(
    pieces: list[tuple[int, float, float]], target: float, share: float
) -> None:
    points = [Point(0, 0.0, 6.0)]
    for steps, seconds, loss in pieces:
        points.append(Point(points[-1].step + steps, points[-1].seconds + seconds, loss))
    for point in points:
        assert loss_after(points, point.seconds) == pytest.approx(point.loss)
    for a, b in itertools.pairwise(points):
        between = loss_after(points, a.seconds + share * (b.seconds - a.seconds))
        assert between == pytest.approx(a.loss + share * (b.loss - a.loss), abs=1e-6)
    reached = first_reach(points, target)
    if reached is None:
        assert min(point.loss for point in points) > target
    else:
        step, seconds = reached
        assert 0 <= step <= points[-1].step
        assert loss_after(points, seconds) == pytest.approx(min(target, 6.0), abs=1e-6)
        assert all(point.loss > target for point in points if point.step < math.floor(step))


def test_numbers_are_written_with_one_sign_and_no_negative_zero() -> None:
    assert [signed(x, 4) for x in (-0.00001, 0.00001, -0.5)] == ["0.0000", "0.0000", "−0.5000"]
    assert signed(1234.5, 0) == "+1,234"
    assert spread(summarize([1.0, 3.0]), 2) == "2.00 ± 1.41"
    assert spread(summarize([1.0])) == "1.0000"
    assert interval(summarize([1.0])) == "–"
    assert (listed([7]), listed([7, 8]), listed([7, 8, 9])) == ("7", "7 and 8", "7, 8 and 9")
    assert (duration(59 * 60), duration(3599), duration(7260)) == ("59 m", "1 h 00 m", "2 h 01 m")


# The comparison


def test_the_main_table_holds_means_spreads_and_paired_intervals(tmp_path: Path) -> None:
    ends = {"megalodon": (1.40, 1.41, 1.42), "llama": (1.44, 1.46, 1.51)}
    for model, values in ends.items():
        for seed, end in zip((7, 8, 9), values, strict=True):
            make_run(
                tmp_path / "runs" / f"{model}{seed}",
                model,
                seed,
                loss=line(end + 1.2, end),
                step_seconds={"megalodon": 2.5, "llama": 2.0}[model],
            )
    text = report(tmp_path)
    table = section(text, "At equal steps")
    assert row(table, "parameters") == ["11,277,696", "12,489,600", "−1,211,904", "–", "−9.70 %"]
    # Differences -0.04, -0.05, -0.09: s = sqrt(0.0014 / 2), the half width 4.3027 s / sqrt(3).
    gap, width = "−0.0600", "−0.1257 to +0.0057"
    at_end = ["1.4100 ± 0.0100", "1.4700 ± 0.0361", gap, width, "−4.08 %"]
    assert row(table, "validation loss at 1200") == at_end
    late = ["1.5100 ± 0.0100", "1.5700 ± 0.0361", gap, width, "−3.82 %"]
    assert row(table, "validation loss at 1100") == late
    bits = ["2.0342 ± 0.0144", "2.1208 ± 0.0520", "−0.0866", "−0.1814 to +0.0083", "−4.08 %"]
    assert row(table, "BPC at 1200") == bits
    full = row(table, "BPC of the whole validation split")
    assert full[:2] == ["2.1785 ± 0.0144", "2.2650 ± 0.0520"]  # 0.1 nats more
    seconds = ["3,000 ± 0", "2,400 ± 0", "+600", "+600 to +600", "+25.00 %"]
    assert row(table, "wall-clock of the training, s") == seconds
    assert row(table, "bytes (tokens) per second")[:3] == ["3,277 ± 0", "4,096 ± 0", "−819"]
    assert row(table, "peak memory, MiB")[0] == "1,200 ± 0"
    steps = re.findall(r"^\| ([\d,]+) \|", table.split("### Every 100 steps")[1], re.MULTILINE)
    assert [int(step.replace(",", "")) for step in steps] == list(range(0, 1201, 100))
    cells = ["2.6100 ± 0.0100", "2.6700 ± 0.0361", gap, width, "3.7654", "3.8520"]
    assert row(table.split("### Every 100 steps")[1], "0") == cells
    assert "undecided, since the 95 % interval of the difference over 3 seeds is −0.1814" in text
    assert "1.3852 to 1.4348 and 1.3804 to 1.5596, touch; that of the difference, " in text
    assert "−0.1257 to +0.0057, contains zero" in text


def test_the_time_that_each_needs_is_read_between_validations(tmp_path: Path) -> None:
    for seed in (7, 8):
        options = {"loss": line(2.0, 1.4), "step_seconds": 3.0}
        make_run(tmp_path / "runs" / f"m{seed}", "megalodon", seed, **options)
        options = {"loss": line(2.1, 1.5), "step_seconds": 2.0}
        make_run(tmp_path / "runs" / f"l{seed}", "llama", seed, **options)
    text = report(tmp_path)
    table = section(text, "At equal wall-clock")
    # After 2400 s the Llama is at its end, 1.5, and the Megalodon at step 800: 1.6.
    cells = ["2.3083 ± 0.0000", "2.1640 ± 0.0000", "+0.1443", "+0.1443 to +0.1443", "Llama"]
    assert row(table, "2,400") == cells
    assert row(table, "600")[:2] == ["2.7411 ± 0.0000", "2.8133 ± 0.0000"]  # 1.9 and 1.95
    assert row(table, "600")[-1] == "Megalodon"
    assert row(table, "Megalodon", "the Llama") == ["1,000 ± 0", "3,000 ± 0"]
    assert row(table, "Llama", "Megalodon") == ["not reached", "not reached"]
    assert (
        "Megalodon reaches 2.0198 bits per byte and the Llama 2.1640: 6.67 % lower, a difference "
        "of 0.1443 with a 95 % interval of 0.1443 to 0.1443 over 2 seeds. At equal wall-clock the "
        "Llama is ahead: 2.1640 against 2.3083 bits per byte after 2,400 s of training, in which "
        "the Llama had made all its steps."
    ) in text


def test_a_target_that_some_seeds_reach_is_said_to_be_that(tmp_path: Path) -> None:
    for seed in (7, 8):
        make_run(tmp_path / "runs" / f"m{seed}", "megalodon", seed, loss=line(2.0, 1.4))
        end = {7: 1.3, 8: 1.5}[seed]
        make_run(tmp_path / "runs" / f"l{seed}", "llama", seed, loss=line(2.0, end))
    table = section(report(tmp_path), "At equal wall-clock")
    assert row(table, "Megalodon", "the Llama") == ["not reached with 1 of 2 seeds"] * 2
    assert "it is undecided who is ahead" in table


def test_one_seed_has_no_interval_and_the_report_says_so(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (8,))
    text = report(tmp_path)
    assert "with the one seed tried, so without an interval" in text
    assert "is ahead, with the one seed tried:" in text
    assert "there is no interval, and another seed may" in text
    cells = row(section(text, "At equal steps"), "validation loss at 1200")
    assert cells == ["1.4000", "1.4500", "−0.0500", "–", "−3.45 %"]
    assert "nan" not in text


@pytest.mark.parametrize("other", [{"device": "cuda (NVIDIA H100)"}, {"threads": 1}])
def test_seconds_of_different_machines_are_not_compared(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    make_run(tmp_path / "runs" / "m", "megalodon", 7)
    make_run(tmp_path / "runs" / "l", "llama", 7, environment=other)
    text = report(tmp_path)
    assert text.count("At equal wall-clock nothing can be said") == 2
    assert "is ahead" not in text
    assert "differ in device or threads: their seconds do not compare" in text


def test_the_first_screen_says_what_on_what_how_sure_and_how_to_check(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs")
    text = report(tmp_path)
    start = text[: text.index("![")]
    assert len(start) < 3500
    for part in ("What was compared", "On what", "The result", "How sure", "How to check it"):
        assert f"**{part}.** " in start
    assert "1,200 steps of 16 sequences of 512 bytes" in start
    assert "seeds 7, 8 and 9; on cpu (2 of 2 cores)" in start
    assert "The sample (6.1 MB of English Wikipedia, not enwik8): 5,480,771 bytes" in start
    assert "do not touch" in start
    assert "excludes zero" in start
    assert "4 h 00 m of training in all for the 6" in start
    assert str(tmp_path) not in text
    assert "enwik8" not in section(text, "At equal steps")


def test_the_same_runs_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    runs = make_pair(tmp_path / "runs")
    first = report(tmp_path, *runs)
    picture = (tmp_path / "results" / "comparison.svg").read_bytes()
    assert b"<svg" in picture
    assert report(tmp_path, *runs[::-1], runs[0]) == first
    assert (tmp_path / "results" / "comparison.svg").read_bytes() == picture


def test_pages_and_commands_name_folders_as_seen_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path / "kept" / "runs", (7,))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    options = ["--out", elsewhere / "R.md", "--pictures", tmp_path / "my pictures"]
    assert main(["kept/runs", *map(str, options)]) == 0
    text = (elsewhere / "R.md").read_text()
    command = "python -m megalodon_enwik8.report kept/runs --out R.md --pictures 'my pictures'\n"
    assert command in text
    assert "](../my%20pictures/comparison.svg)" in text
    assert (tmp_path / "my pictures" / "comparison.svg").exists()
    assert "`python train.py --config kept/runs/llama-7/config.yaml run_dir=runs/llama-7`" in text


def test_samples_are_shown_where_they_were_made_alike(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8))
    samples = section(report(tmp_path), "Samples")
    assert "the first 128 bytes of the validation split as a prompt, and 512 bytes" in samples
    # What a model writes neither ends the block nor reaches a terminal.
    assert "~~~~~text\nA prompt, and megalodon:\n~~~~ \ufffd[2J\n~~~~~\n" in samples
    shutil.rmtree(tmp_path / "runs" / "llama-7")
    make_run(tmp_path / "runs" / "llama-7", "llama", 7, min_p=0.2)
    assert "## Samples" not in report(tmp_path)


def test_skipped_steps_and_lacking_figures_are_said(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "m", "megalodon", 7, end={"skipped_steps": 3})
    make_run(tmp_path / "runs" / "l", "llama", 7, end={"full_val_loss": None})
    table = section(report(tmp_path), "At equal steps")
    assert "m skipped 3 steps" in table
    assert row(table, "BPC of the whole validation split") == ["2.1496", "–", "–", "–", "–"]


def test_neutral_keys_leave_a_run_in_the_protocol(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "m", "megalodon", 7, compile=True, gradient_checkpointing=True)
    make_run(
        tmp_path / "runs" / "l",
        "llama",
        7,
        batch_size=16,
        grad_accum_every=1,
        keep_last=1,
        validate_every=50,
        on_nonfinite="skip",
    )
    table = section(report(tmp_path), "At equal steps")
    assert row(table, "validation loss at 1200")[:2] == ["1.3900", "1.4400"]


# The other tables


def write_evaluation(
    run: Path, name: str, reading: dict[str, int], loss: float, **other: Any
) -> None:
    facts = {"step": 1200, "model": "megalodon", "corpus_sha256": SAMPLE_SHA256, "split": "val"}
    (run / name).write_text(json.dumps({**facts, "reading": reading, "loss": loss, **other}))


BEST = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50}


def make_tuned(folder: Path, seeds: tuple[int, ...] = (7, 8)) -> None:
    """A grid of three settings, the protocol's among them, and the best ones at full length."""
    for model in ("megalodon", "llama"):
        worse = {"megalodon": 0.3, "llama": 0.2}[model]
        for name, config, end in (("a", {"learning_rate": 2e-3}, 1.6), ("b", BEST, 1.5)):
            run = folder / f"grid-{model}-{name}"
            make_run(run, model, 7, num_batches=400, loss=line(3, end + worse, 400), **config)
        for seed in seeds:
            make_run(
                folder / f"best-{model}-{seed}", model, seed, loss=line(3, 1.0 + worse), **BEST
            )
    for seed in seeds:
        run = folder / f"carried-{seed}"
        make_run(run, "megalodon", seed, loss=line(3, 1.25), carry_state=True, **BEST)
        write_evaluation(run, "stream.json", {"streams": 1, "segment": 8192}, 1.1)
        write_evaluation(run, "windows.json", {"context": 512, "stride": 512}, 1.2)


def test_each_model_enters_with_the_best_of_its_grid(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 1.5))
    make_tuned(tmp_path / "runs")
    text = section(report(tmp_path), "Each model at its own best")
    assert "The grid: 3 settings of Megalodon and 3 settings of Llama" in text
    assert "after 400 steps with seed 7" in text
    # The protocol's runs, from 3 to 1.5, are at 2.5 by then.
    assert row(text, "0.0004", "constant", "0") == ["2.5000", "2.5000"]
    assert row(text, "0.001", "cosine", "50")[:2] == ["**1.8000**", "**1.7000**"]
    assert row(text, "0.002", "constant", "0") == ["1.9000", "1.8000"]
    start = ["0.001", "cosine", "50"]
    ours = row(text, "Megalodon", *start)
    assert ours[:4] == ["1.3000 ± 0.0000", "1.8755", "+0.1000", "+0.1000 to +0.1000"]
    assert row(text, "Llama", *start)[2:4] == ["–", "–"]
    carried = row(text, "Megalodon with carried state", *start)
    assert carried[:3] == ["1.2500 ± 0.0000", "1.8034", "+0.0500"]
    assert carried[4:6] == ["1.7312 ± 0.0000", "1.5870 ± 0.0000"]  # 1.2 and 1.1 nats
    assert "the Llama reaches 1.7312 bits per byte and Megalodon 1.8755: 7.69 % lower" in text
    # From 3 the Llama falls by 1.8 in its 1200 steps, and by 1.7 in 1133.
    assert row(text, "Llama", "Megalodon") == ["1,133 ± 0", "2,267 ± 0"]
    assert (tmp_path / "results" / "tuned.svg").exists()


def test_the_protocols_runs_enter_where_theirs_is_the_best_setting(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 0.5))
    for model in ("megalodon", "llama"):
        options = {"num_batches": 400, "learning_rate": 1e-3, "loss": line(3, 2.5, 400)}
        make_run(tmp_path / "runs" / model, model, 7, **options)
    make_run(tmp_path / "runs" / "carried", "megalodon", 8, carry_state=True)
    text = section(report(tmp_path), "Each model at its own best")
    assert "After 1,200 steps, seed 8, each model at its own best" in text
    assert row(text, "Llama", "0.0004", "constant", "0")[0] == "0.5000"


def test_a_short_run_of_the_protocol_belongs_to_a_grid_of_its_length(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7,))
    for model in ("megalodon", "llama"):
        for rate in (4e-4, 1e-3):
            options = {"num_batches": 400, "learning_rate": rate, "loss": line(3, 1000 * rate, 400)}
            make_run(tmp_path / "runs" / f"{model}-{rate}", model, 7, **options)
    text = section(report(tmp_path), "Each model at its own best")
    assert row(text, "0.0004", "constant", "0") == ["**0.4000**", "**0.4000**"]
    assert "No run of full length with these settings is given yet." in text


def test_an_ablation_is_compared_with_the_protocol_at_its_step_and_seed(tmp_path: Path) -> None:
    for seed, end in ((7, 1.2), (8, 1.5)):
        make_run(tmp_path / "runs" / f"m{seed}", "megalodon", seed, loss=line(3, end))
        make_run(tmp_path / "runs" / f"l{seed}", "llama", seed, loss=line(3.1, end + 0.1))
    changes: dict[str, tuple[dict[str, Any], float]] = {
        "n16": ({"cema_ndim": 16}, 2.39),
        "no": ({"ablation": "no_cema"}, 2.48),
        "long": ({"chunk_size": 512}, 2.41),
        "short": ({"chunk_size": 128}, 2.42),
        "norm": ({"ablation": "layer_norm"}, 2.43),
    }
    for name, (config, end) in changes.items():
        run = tmp_path / "runs" / name
        make_run(run, "megalodon", 7, num_batches=400, loss=line(3, end, 400), **config)
    text = section(report(tmp_path), "What carries the gain")
    assert row(text, "Megalodon as in the protocol")[1] == "2.4000"  # of seed 7, a third of the way
    cells = ["11,277,696", "2.4800", "3.5779", "+0.0800", "–", "+3.33 %"]
    assert row(text, "without CEMA") == cells
    assert row(text, "N = 16")[3] == "−0.0100"
    assert row(text, "Llama")[3] == "+0.1000"
    names = [each.split(" | ")[0] for each in text.splitlines() if each.startswith("| ")]
    assert names[3:8] == [
        "| without CEMA",
        "| LayerNorm in place of TimestepNorm",
        "| chunks of 128",
        "| chunks of 512",
        "| N = 16",
    ]
    assert "0.1000 below the Llama in validation loss. Without CEMA: 0.0800 higher, 80 %" in text
    assert "N = 16: 0.0100 lower. With one seed there is no interval." in text
    assert "varies by 0.0707 (standard deviation over 2 seeds)" in text  # 2.4 and 2.5


def test_runs_on_enwik8_fill_the_column_beside_the_published_figures(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs")
    before = report(tmp_path)
    empty = section(before, "enwik8: the published figures")
    assert "not measured here" in empty
    assert row(empty, "Megalodon", "validation loss at 1100")[1] == ""
    assert row(empty, "Llama", "1200 steps") == ["3 m 07 s", ""]
    make_run(
        tmp_path / "runs" / "e",
        "megalodon",
        7,
        corpus="enwik8",
        loss=line(3, 1.5),
        step_seconds=0.5,
    )
    after = report(tmp_path)
    assert section(after, "At equal steps") == section(before, "At equal steps")
    filled = section(after, "enwik8: the published figures")
    assert row(filled, "Megalodon", "parameters") == ["11,277,696", "11,277,696"]
    assert row(filled, "Megalodon", "validation loss at 1100")[1] == "1.6250"
    assert row(filled, "Megalodon", "BPC at 1100") == ["2.10", "2.3444"]
    assert row(filled, "Megalodon", "peak memory") == ["12 GB", "1.3 GB"]
    assert row(filled, "Megalodon", "1200 steps") == ["8 m 09 s", "10 m 00 s"]
    assert row(filled, "Llama", "BPC at 1100") == ["2.21", ""]
    assert "Measured: Megalodon with seed 7, as these" in filled


def test_runs_on_enwik8_alone_are_compared_as_such(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7,), corpus="enwik8")
    text = report(tmp_path)
    assert "On the first 95,000,000 bytes of enwik8, after 1,200 steps" in text
    assert row(section(text, "enwik8: the published figures"), "Llama", "parameters")[1]


def context_rows() -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "model": model,
            "context": context,
            "layers": 2,
            "tokens": 32768,
            "chunk_size": 256,
            "use_autocast": True,
            "compile": False,
            "gradient_checkpointing": False,
            "tokens_per_second": 1e7 / context,
            "peak_memory_bytes": context * 1e6,
            "device": "cpu",
            "torch": "2.13.0",
        }
        for model in ("megalodon", "llama")
        for context in (512, 1024)
    ]


def test_benchmarks_are_shown_where_they_are_given(tmp_path: Path) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    assert "## Speed" not in report(tmp_path)
    context, speed = tmp_path / "context.json", tmp_path / "train.json"
    context.write_text(json.dumps({"rows": context_rows()}))
    figures = {"micro_batch": 4, "mode": "eager"}
    step = {**figures, "step_seconds": 1.5, "tokens_per_second": 5461.3, "peak_memory_bytes": 2e9}
    facts = {"device": "cpu", "threads": 2, "torch": "2.13.0", "sequences": 16, "seq_len": 512}
    speed.write_text(
        json.dumps(
            {
                **facts,
                "dtype": "bfloat16 autocast",
                "rows": [{**step, "model": "llama"}, {**step, "model": "megalodon"}],
                "ratios": [{**figures, "time": 0.8, "memory": 1.1}],
            }
        )
    )
    text = report(tmp_path, *runs, "--context", context, "--speed", speed)
    assert row(section(text, "Speed and memory against context"), "1,024")[0] == "9,766"
    assert (tmp_path / "results" / "context.svg").exists()
    assert "](results/context.svg)" in text
    table = section(text, "Speed of a training step")
    assert row(table, "Llama", "eager", "4") == ["1.500", "5,461", "2,000"]
    assert row(table, "eager", "4") == ["0.80", "1.10"]


def test_the_readme_gets_the_headline_and_the_main_picture(tmp_path: Path) -> None:
    runs = make_pair(tmp_path / "runs")
    readme = tmp_path / "docs" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n")
    for _ in range(2):  # what it wrote it can replace
        text = report(tmp_path, *runs, "--readme", readme)
        made = readme.read_text()
        headline = text.split("**The result.** ")[1].split("\n")[0]
        assert made.startswith(f"# Title\n\n{BEGIN}\n\n{headline}\n\n![BPC of Megalodon")
        assert made.endswith(f"[RESULTS.md](../RESULTS.md).\n\n{END}\n\nThe rest.\n")
        assert "](../results/comparison.svg)" in made
        assert "old" not in made


# What is refused


def change_config(run: Path, **changes: Any) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def change_facts(run: Path, **changes: Any) -> None:
    path = run / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_end(run: Path, **changes: Any) -> None:
    path = run / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(last), **changes}), ""]))


def append(run: Path, text: str) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "llama-8: no such run folder"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "llama-8: has no config.yaml"),
    "no environment": (
        lambda run: (run / "environment.json").unlink(),
        "llama-8: has no environment.json",
    ),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "llama-8: has no metrics.jsonl"),
    "empty metrics": (
        lambda run: (run / "metrics.jsonl").write_text(""),
        "metrics.jsonl: is empty: the run has made no step yet",
    ),
    "bad line": (lambda run: append(run, "{'step': 1\n"), "metrics.jsonl: line 26 is damaged"),
    "bad number": (
        lambda run: append(run, '{"step": 1201, "seconds": "long"}\n'),
        r"metrics.jsonl: line 26: seconds: Input should be a valid number",
    ),
    "not later": (
        lambda run: change_end(run, seconds=2000.0),
        "line 25: is not later than the validation before it",
    ),
    "no final loss": (
        lambda run: change_end(run, val_loss=None),
        "the last line, of the end of the run, has no val_loss",
    ),
    "yaml": (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml: not valid YAML"),
    "list": (lambda run: (run / "config.yaml").write_text("- a"), "must hold `key: value` lines"),
    "seed": (lambda run: change_config(run, seed="x"), "config.yaml: seed: Input should be"),
    "json": (
        lambda run: (run / "environment.json").write_text("{"),
        "environment.json: not valid JSON",
    ),
    "facts": (lambda run: change_facts(run, sessions=[]), "environment.json: sessions: "),
    "key": (
        lambda run: change_config(run, weight_decay=0.1, dim=512),
        "llama-8: belongs in no table: differs from the protocol in dim=512, weight_decay=0.1;",
    ),
    "unknown key": (
        lambda run: change_config(run, wight=1),
        "differs from the protocol in wight=1",
    ),
    "other model's key": (
        lambda run: change_config(run, cema_ndim=16),
        "llama-8: belongs in no table: differs from the protocol in cema_ndim=16",
    ),
    "parameters": (
        lambda run: change_facts(run, parameters=5),
        "llama-7 and .*llama-8 cannot stand in one table: parameters: 12489600 in the first, 5 in",
    ),
    "windows": (
        lambda run: change_config(run, val_batches=10),
        "megalodon-7 and .*llama-8 cannot stand in one table: windows to validate on: 100 in the "
        "first, 10 in the second",
    ),
    "twice": (
        lambda run: change_config(run, seed=7),
        "llama-7 and .*llama-8 are of the same settings and seed 7: leave one out",
    ),
    "stream of another text": (
        lambda run: write_evaluation(run, "stream.json", {"streams": 1}, 1.0, corpus_sha256="f"),
        r"llama-8.stream.json: model is megalodon, but llama of the run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_is_not_whole_or_fits_nowhere_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    runs = make_pair(tmp_path / "runs", (7, 8))
    spoil, message = DAMAGES[damage]
    spoil(runs[-1])
    assert re.search(message, refused(capfd, *runs, "--out", tmp_path / "RESULTS.md"))
    assert not (tmp_path / "RESULTS.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "other"}, r"text: sample \(34c1c63050c8...\) in the first, other \(otherother"),
        ({"corpus": "enwik8", "num_batches": 600}, "text: sample .* in the first, enwik8"),
        ({"num_batches": 600}, "steps: 1200 in the first, 600 in the second"),
        ({"seq_len": 256}, "bytes in a sequence: 512 in the first, 256 in the second"),
        ({"batch_size": 2}, "bytes in a step: 8192 in the first, 4096 in the second"),
        ({"num_batches": 250, "cut_at": 150}, "still going or cut off, after 101 of 250 steps"),
    ],
)
def test_mixed_and_unfinished_runs_are_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    odd = make_run(tmp_path / "odd", "llama", 8, **options)
    line = refused(capfd, *runs, odd, "--out", tmp_path / "RESULTS.md")
    assert re.search(message, line)
    assert str(odd) in line


def test_a_seed_that_one_model_lacks_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs")
    said = refused(capfd, *runs[:-1], "--out", tmp_path / "R.md")
    assert "llama has no run with seed 9, which megalodon has" in said
    said = refused(capfd, *runs[3:], "--out", tmp_path / "R.md")
    assert "megalodon has no run with seed 7, which llama has" in said


def test_the_tuned_table_refuses_an_unfair_fight(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 1.5))
    make_tuned(tmp_path / "runs")

    def said_without(*names: str) -> str:
        kept = [run for run in sorted((tmp_path / "runs").iterdir()) if run.name not in names]
        return refused(capfd, *kept, "--out", tmp_path / "R.md")

    said = said_without("grid-llama-a")
    assert "the grid has 3 settings of megalodon and 2 of llama" in said
    assert "add llama at learning rate 0.002, constant" in said
    said = said_without("best-llama-7", "best-llama-8")
    assert "Llama has no run of 1200 steps at learning rate 0.001, cosine, warm-up of 50" in said
    assert "Llama has no run with seed 8" in said_without("best-llama-8")
    said = said_without("grid-llama-b", "grid-megalodon-b")
    assert "best-megalodon-7: learning rate 0.001, cosine, warm-up of 50 steps is not the" in said
    odd = make_run(tmp_path / "runs" / "odd", "llama", 9, learning_rate=3e-3)
    assert "are Llama with different settings" in said_without()
    shutil.rmtree(odd)
    make_run(odd, "llama", 9, learning_rate=3e-3, num_batches=1500)
    assert "steps: 1200 in the first, 1500 in the second" in said_without()
    shutil.rmtree(odd)
    make_run(odd, "llama", 9, learning_rate=3e-3, num_batches=300)
    assert re.search("steps: [34]00 in the first, [34]00 in the second", said_without())


def test_an_ablation_without_its_counterpart_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    out = ("--out", tmp_path / "R.md")
    change: dict[str, Any] = {"ablation": "no_cema"}
    seed = make_run(tmp_path / "seed", "megalodon", 8, num_batches=400, **change)
    assert "megalodon has no run with seed 8 to compare" in refused(capfd, *runs, seed, *out)
    step = make_run(tmp_path / "step", "megalodon", 7, num_batches=450, **change)
    assert "has no validation after 450 steps" in refused(capfd, *runs, step, *out)
    both = make_run(tmp_path / "both", "megalodon", 7, learning_rate=1e-3, **change)
    assert "in ablation=no_cema, learning_rate=0.001" in refused(capfd, *runs, both, *out)
    assert "no run has the settings of the protocol" in refused(capfd, step, *out)


@pytest.mark.parametrize(
    ("name", "reading", "other", "message"),
    [
        ("stream.json", {"context": 512, "stride": 512}, {}, "is not of a stream"),
        ("windows.json", {"context": 512, "stride": 64}, {}, "is not of windows of 512 side by"),
        ("windows.json", {"streams": 1}, {"step": 600}, "step is 600, but 1200 of the run"),
        ("stream.json", {"streams": 1}, {"split": "train"}, "split is train, but val of the run"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    reading: dict[str, int],
    other: dict[str, Any],
    message: str,
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    write_evaluation(runs[0], name, reading, 1.0, **other)
    said = refused(capfd, *runs, "--out", tmp_path / "R.md")
    assert f"megalodon-7{os.sep}{name}: {message}" in said


def test_files_that_are_not_what_they_should_be_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    odd = tmp_path / "odd"
    assert f"{odd}: cannot be read: No such file" in refused(capfd, *runs, "--readme", odd)
    for text in ("no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        odd.write_text(text)
        assert f"{odd}: needs one line {BEGIN}" in refused(capfd, *runs, "--readme", odd)
    for text in ("{", "[]", "{}", '{"rows": [1]}', '{"rows": []}', '{"rows": [{"kind": "train"}]}'):
        odd.write_text(text)
        assert "is no context.json" in refused(capfd, *runs, "--context", odd)
        if text != '{"rows": []}':
            assert "is no train.json" in refused(capfd, *runs, "--speed", odd)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(capfd, tmp_path, "--out", tmp_path / "R.md")
    assert 'comparison.svg: drawing needs matplotlib: pip install -e ".[report]"' in said
