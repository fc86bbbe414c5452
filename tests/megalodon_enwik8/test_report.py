"""The report's figures follow from the runs, and what cannot be compared is refused by name."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.report import BEGIN, END, main
from megalodon_enwik8.report_format import duration, interval, listed, signed, spread
from megalodon_enwik8.report_statistics import (
    Point,
    first_reach,
    loss_after,
    paired,
    summarize,
)

from .run_folders import (
    line,
    make_pair,
    make_run,
    make_tuned,
    report,
    row,
    section,
)

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
    medians = ["2.500 ± 0.000", "2.000 ± 0.000", "+0.500", "+0.500 to +0.500", "+25.00 %"]
    assert row(table, "a step, s (median)") == medians
    assert row(table, "peak memory, MB")[0] == "1,258 ± 0"
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
        "of 0.1443 with a 95 % interval of 0.1443 to 0.1443 over 2 seeds (over the whole "
        "validation split 2.1640 and 2.3083). At equal wall-clock on cpu (2 of 2 cores), the Llama "
        "is ahead: 2.1640 against 2.3083 bits per byte after 2,400 s of training, when the fastest "
        "run, one of the Llama, was done, a difference of 0.1443 with a 95 % interval of "
        "0.1443 to 0.1443. Beside the Llama, Megalodon has 10 % fewer parameters and takes as much "
        "memory at its peak."
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
    assert "was done, with the one seed tried, so without an interval" in text
    assert "there is no interval, and another seed may" in text
    cells = row(section(text, "At equal steps"), "validation loss at 1200")
    assert cells == ["1.4000", "1.4500", "−0.0500", "–", "−3.45 %"]
    assert "nan" not in text


@pytest.mark.parametrize(
    ("environment", "config", "difference"),
    [
        ({"device": "cuda (NVIDIA H100)"}, {}, "device"),
        ({"processor": "Another"}, {}, "device"),
        ({"threads": 1}, {}, "threads"),
        ({"torch": "2.12.0"}, {}, "version of PyTorch"),
        ({"compile": "on (it pays)"}, {}, "compilation"),
        ({}, {"batch_size": 16, "grad_accum_every": 1}, "sequences in a micro-batch"),
        ({}, {"gradient_checkpointing": True}, "gradient checkpointing"),
    ],
)
def test_seconds_and_memory_of_unlike_runs_are_not_compared(
    tmp_path: Path, environment: dict[str, Any], config: dict[str, Any], difference: str
) -> None:
    make_run(tmp_path / "runs" / "m", "megalodon", 7)
    make_run(tmp_path / "runs" / "l", "llama", 7, environment=environment, **config)
    text = report(tmp_path)
    said = f"At equal wall-clock nothing can be said: the runs differ in {difference}."
    assert text.count(said) == 2
    assert "is ahead" not in text
    table = section(text, "At equal steps")
    for name in ("wall-clock of the training, s", "a step, s (median)", "peak memory, MB"):
        assert row(table, name)[2:] == ["–", "–", "–"]
    assert f"Time and memory are not compared: the runs differ in {difference}." in table
    assert row(section(text, "At equal wall-clock"), "Megalodon", "the Llama")[1] == "–"
    assert "memory at its peak" not in text
    assert b"seconds of training" not in (tmp_path / "results" / "comparison.svg").read_bytes()


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
    assert "4 h 00 m of training steps in all for the 6" in start
    assert "of which a run reads 1.8 times as many" in start
    assert "(8.4 % of the split, evenly spaced)" in start
    assert "report runs/again --out runs/again.md\n" in start
    assert str(tmp_path) not in text
    assert "enwik8" not in section(text, "At equal steps")


def test_the_same_runs_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    runs = make_pair(tmp_path / "runs")
    first = report(tmp_path, *runs)
    picture = (tmp_path / "results" / "comparison.svg").read_bytes()
    assert b"seconds of training" in picture
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
    own = "kept/runs --out elsewhere/R.md --pictures 'my pictures'\n"
    assert f"python -m megalodon_enwik8.report {own}" in text
    assert "](../my%20pictures/comparison.svg)" in text
    assert (tmp_path / "my pictures" / "comparison.svg").exists()
    assert (
        "`python train.py --config kept/runs/llama-7/config.yaml run_dir=runs/again/runs/llama-7`"
        in text
    )


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


def test_each_model_enters_with_the_best_of_its_grid(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 1.5))
    make_tuned(tmp_path / "runs")
    text = section(report(tmp_path), "Each model at settings of its own")
    assert "The grid: 3 settings of Megalodon and 3 settings of Llama" in text
    assert "after 400 steps with seed 7" in text
    # The protocol's runs, from 3 to 1.5, are at 2.5 by then.
    assert row(text, "0.0004", "constant", "0", "–") == ["2.5000", "2.5000"]
    assert row(text, "0.001", "cosine", "50", "–")[:2] == ["**1.8000**", "**1.7000**"]
    assert row(text, "0.002", "constant", "0", "–") == ["1.9000", "1.8000"]
    start = ["0.001", "cosine", "50", "–"]
    ours = row(text, "Megalodon", *start)
    assert ours[:4] == ["1.3000 ± 0.0000", "1.8755", "+0.1000", "+0.1000 to +0.1000"]
    assert row(text, "Llama", *start)[2:4] == ["–", "–"]
    carried = row(text, "Megalodon with carried state", *start[:-1], "8 steps")
    assert carried[:3] == ["1.2500 ± 0.0000", "1.8034", "+0.0500"]
    assert carried[4:6] == ["1.7312 ± 0.0000", "1.5870 ± 0.0000"]  # 1.2 and 1.1 nats
    assert "the Llama reaches 1.7312 bits per byte and Megalodon 1.8755: 7.69 % lower" in text
    # From 3 the Llama falls by 1.8 in its 1200 steps, and by 1.7 in 1133.
    assert row(text, "Llama", "Megalodon") == ["1,133 ± 0", "2,267 ± 0"]
    assert (tmp_path / "results" / "tuned.svg").exists()
    page = report(tmp_path)
    start = page[: page.index("## At equal steps")]
    assert "With the best settings tried for each, after 1,200 steps on the same" in start
    assert "**Megalodon with carried state and the Llama**" in text
    assert "After 1,200 steps on as much data, the Llama reaches 1.7312" in text
    assert "As a stream: with the state carried from each byte to the next" in text
    again = "runs/again/carried-7"
    reading = f"{again}/final.pt --stream --streams 1 --out {again}/stream.json\n"
    assert f"python -m megalodon_enwik8.evaluation {reading}" in page
    assert "The best of the Llama has the only learning rate tried with its schedule" in text


def test_the_best_at_the_end_enters_and_all_that_were_run_to_it_are_named(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 1.5))
    make_tuned(tmp_path / "runs")
    options = {"learning_rate": 2e-3, "loss": line(3, 1.1)}
    for seed in (7, 8):
        make_run(tmp_path / "runs" / f"second-{seed}", "llama", seed, **options)
    text = section(report(tmp_path), "Each model at settings of its own")
    assert row(text, "0.001", "cosine", "50", "–")[1] == "**1.7000**"  # the grid's best
    assert row(text, "Llama", "0.002", "constant", "0", "–")[0] == "1.1000 ± 0.0000"
    assert (
        "Llama was run for all 1,200 steps at learning rate 0.002, constant: 1.1000 ± 0.0000; "
        "learning rate 0.001, cosine, warm-up of 50 steps: 1.2000 ± 0.0000; learning rate 0.0004, "
        "constant: 1.5000 ± 0.0000 (validation loss, seeds 7 and 8). The first of these "
        "enters."
    ) in text
    assert "The best of the Llama has the highest learning rate tried with its schedule" in text


def test_a_best_setting_at_the_edge_of_its_grid_is_said_to_be_that(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7,), loss=line(3, 1.5))
    for model, best in (("megalodon", 2e-3), ("llama", 1e-3)):
        for rate in (1e-3, 2e-3):
            options = {"num_batches": 400, "learning_rate": rate}
            end = 2.0 if rate == best else 2.1
            run = tmp_path / "runs" / f"{model}{rate}"
            make_run(run, model, 7, loss=line(3, end, 400), **options)
    text = section(report(tmp_path), "Each model at settings of its own")
    assert "The best of Megalodon has the highest learning rate tried with its schedule" in text
    assert "The best of the Llama" not in text  # the protocol's rate is below


def test_tuned_runs_without_a_grid_are_not_called_the_best(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7,))
    for model in ("megalodon", "llama"):
        make_run(tmp_path / "runs" / f"{model}-t", model, 7, learning_rate=1e-3)
    page = report(tmp_path)
    text = section(page, "Each model at settings of its own")
    assert "No grid is given: the settings are those of the runs, not the best of any." in text
    assert "each model with settings of its own" in text
    assert "best" not in page.replace("not the best of any", "")


def test_the_protocols_runs_enter_where_theirs_is_the_best_setting(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 0.5))
    for model in ("megalodon", "llama"):
        options = {"num_batches": 400, "learning_rate": 1e-3, "loss": line(3, 2.5, 400)}
        make_run(tmp_path / "runs" / model, model, 7, **options)
    make_run(tmp_path / "runs" / "carried", "megalodon", 8, carry_state=True)
    text = section(report(tmp_path), "Each model at settings of its own")
    assert "After 1,200 steps, seed 8, each model with its best settings of those" in text
    assert row(text, "Llama", "0.0004", "constant", "0", "–")[0] == "0.5000"


def test_a_short_run_of_the_protocol_belongs_to_a_grid_of_its_length(tmp_path: Path) -> None:
    make_pair(tmp_path / "runs", (7,))
    for model in ("megalodon", "llama"):
        for rate in (4e-4, 1e-3):
            options = {"num_batches": 400, "learning_rate": rate, "loss": line(3, 1000 * rate, 400)}
            make_run(tmp_path / "runs" / f"{model}-{rate}", model, 7, **options)
    text = section(report(tmp_path), "Each model at settings of its own")
    assert row(text, "0.0004", "constant", "0", "–") == ["**0.4000**", "**0.4000**"]
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
    options = {"num_batches": 400, "loss": line(3, 2.55, 400), "llama_init": "pytorch"}
    make_run(tmp_path / "runs" / "init", "llama", 7, **options)
    text = section(report(tmp_path), "What carries the gain")
    assert row(text, "Megalodon as in the protocol")[1] == "2.4000"  # of seed 7, a third of the way
    cells = ["11,277,696", "2.4800", "3.5779", "+0.0800", "–", "+3.33 %"]
    assert row(text, "without CEMA") == cells
    assert row(text, "N = 16")[3] == "−0.0100"
    assert row(text, "Llama")[3] == "+0.1000"
    names = [each.split(" | ")[0] for each in text.splitlines() if each.startswith("| ")]
    assert names[3:10] == [
        "| without CEMA",
        "| LayerNorm in place of TimestepNorm",
        "| chunks of 128",
        "| chunks of 512",
        "| N = 16",
        "| Llama",
        "| Llama with PyTorch's initialisation",
    ]
    assert row(text, "Llama with PyTorch's initialisation")[3] == "+0.1500"
    assert "PyTorch's initialisation: 0.0500 higher than the Llama of the protocol." in text
    assert "0.1000 below the Llama in validation loss. Without CEMA: 0.0800 higher, 80 %" in text
    assert "N = 16: 0.0100 lower. Llama with" in text
    assert "With one seed there is no interval." in text
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
    assert "Measured: Megalodon with seed 7, on cpu (2 of 2 cores), validated on 100 " in filled


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
