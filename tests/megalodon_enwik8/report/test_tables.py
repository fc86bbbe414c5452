"""Figures in tables follow from the runs, as computed by hand on made-up folders."""

import pytest

from megalodon_enwik8.report.__main__ import main
from megalodon_enwik8.report.pictures import draw_curves, draw_distances
from megalodon_enwik8.report.runs import find_groups, one_group
from megalodon_enwik8.report.tables import (
    compare,
    headline,
    measured_tables,
    runs,
    sample,
    search,
)
from megalodon_enwik8.safety import UserError

from .run_folders import line, make_group, make_run, row

MEGALODON = {7: 1.40, 8: 1.41, 9: 1.42}
LLAMA = {7: 1.44, 8: 1.46, 9: 1.51}


@pytest.fixture
def folder(tmp_path):
    make_group(tmp_path / "runs", "megalodon", MEGALODON)
    make_group(tmp_path / "runs", "llama", LLAMA, step_seconds=4.0)
    return tmp_path / "runs"


def test_two_groups_are_compared_by_means_spreads_and_paired_intervals(folder):
    text = compare(one_group(["megalodon*"], folder), one_group(["llama*"], folder))
    assert row(text, "parameters") == ["1,000", "1,100", "−100", "–", "−9.09 %"]
    # Differences -0.04, -0.05, -0.09: mean -0.06, s 0.0264575, t(2) s / sqrt(3) = 0.0657.
    assert row(text, "loss after 400 steps") == [
        "1.4100 ± 0.0100", "1.4700 ± 0.0361", "−0.0600", "−0.1257 to +0.0057", "−4.08 %",
    ]  # fmt: skip
    assert row(text, "BPC after 400 steps")[:3] == ["2.0342 ± 0.0144", "2.1208 ± 0.0520", "−0.0866"]
    assert row(text, "BPC of the whole split")[0] == "2.1785 ± 0.0144"  # 1.51 nats
    assert row(text, "steps to the other's final loss")[:2] == ["385 ± 7", "not reached by 3 of 3"]
    assert row(text, "peak memory, MB")[:3] == ["300", "300", "0"]
    assert row(text, "200") == [  # step by step, in a table of its own
        "2.2050 ± 0.0050", "2.2350 ± 0.0180", "−0.0300", "−0.0629 to +0.0029", "−1.34 %",
        "3.1811 ± 0.0072", "3.2244 ± 0.0260",
    ]  # fmt: skip


def test_a_comparison_turned_round_has_the_other_signs(folder):
    ours, theirs = one_group(["megalodon*"], folder), one_group(["llama*"], folder)
    there, back = compare(ours, theirs, timing()), compare(theirs, ours, timing())
    for title in ("loss after 400 steps", f"BPC after 410 s of training {ON}", "a step, s"):
        a, b = row(there, title), row(back, title)
        assert (a[0], a[1]) == (b[1], b[0])
        assert a[2].translate(str.maketrans("+−", "−+")) == b[2]


def test_seeds_that_one_group_lacks_are_left_out(folder):
    ours = one_group(["megalodon_7", "megalodon_9"], folder)
    text = compare(ours, one_group(["llama_8", "llama_9"], folder))
    assert text.startswith("| seeds 9 | Megalodon | Llama |")
    assert row(text, "loss after 400 steps") == ["1.4200", "1.5100", "−0.0900", "–", "−5.96 %"]
    alone = one_group(["llama_8"], folder)
    with pytest.raises(UserError, match="megalodon_7 and llama_8: no seed is in both groups"):
        compare(ours, alone)
    assert "the first's" not in runs([ours, alone])


ON = "on cpu (2 of 2 cores)"


def timing(**changes):
    """What `benchmark train` leaves, of the steps of the runs above."""
    steps = {
        "step_bytes": 16 * 512, "seq_len": 512, "chunk_size": 256, "batch_size": 4,
        "use_autocast": True, "compile": False,
        "megalodon": {"step, s": 1.0, "first step, s": 11.0, "peak memory, MB": 2e3},
        "llama": {"step, s": 1.5, "first step, s": 11.0, "peak memory, MB": 1e3},
    }  # fmt: skip
    where = {"device": "cpu (2 of 2 cores)", "processor": "x", "threads": 2, "torch": "2.13.0"}
    return {**where, "rows": [{**steps, **changes}]}


def test_seconds_and_memory_are_a_benchmarks(tmp_path):
    make_group(tmp_path / "runs", "megalodon", MEGALODON)
    make_group(tmp_path / "runs", "llama", LLAMA, session={"device": "cuda (H100)"})
    pair = find_groups(["runs/megalodon*", "runs/llama*"], tmp_path)
    text = compare(*pair, timing())
    assert row(text, "a step, s")[:3] == ["1.000", "1.500", "−0.500"]
    assert row(text, "peak memory, MB")[:3] == ["2,000", "1,000", "+1,000"]
    # 11 s and 399 steps of 1 s; the other is after step 267 by then: 3 - 1.53 * 267 / 400 nats.
    assert row(text, f"BPC after 410 s of training {ON}")[1] == "2.8547 ± 0.0347"
    assert row(text, "seconds to the other's final loss")[1] == "not reached by 3 of 3"
    assert row(text, "seconds to the other's final loss")[0] == "395 ± 7"
    assert draw_curves(pair, timing()).axes[1].get_lines()[0].get_xdata()[-1] == 410


@pytest.mark.parametrize(
    "changes",
    [{"seq_len": 2048}, {"chunk_size": 1024}, {"step_bytes": 4096}, {"batch_size": 8}],
)
def test_a_benchmark_of_other_steps_is_refused(folder, changes):
    group = one_group(["megalodon*"], folder)
    with pytest.raises(UserError, match="megalodon_7: the benchmark has no such step: step_b"):
        compare(group, group, timing(**changes))


def test_a_model_takes_the_fastest_of_such_steps_in_its_own_precision_if_there_is_one(tmp_path):
    run = make_run(tmp_path / "run", batch_size=16, grad_accum_every=1)
    group = one_group([str(run)])
    measured = timing(batch_size=64)  # at once, all there are
    (own,) = measured["rows"]
    faster = {**own, "compile": True, "megalodon": {**own["megalodon"], "step, s": 0.5}}
    other = {**faster, "use_autocast": False, "megalodon": {**own["megalodon"], "step, s": 0.1}}
    measured["rows"] = [other, own, faster]
    text = compare(group, group, measured)
    assert row(text, "a step, s")[0] == "0.500"
    assert row(text, f"BPC after 210 s of training {ON}")[0] == "1.4427"  # 11 + 399 / 2
    measured["rows"] = [other]
    text = compare(group, group, measured)
    assert row(text, f"BPC after 51 s of training {ON}, in float32")[0] == "1.4427"


def test_memory_of_unlike_devices_is_left_out_and_so_are_a_runs_own_seconds(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "llama", session={"device": "cuda (H100)"})
    for text in (compare(*find_groups(["a", "b"], tmp_path)), runs(find_groups(["*"], tmp_path))):
        assert "step, s" not in text
        assert "seconds" not in text
        assert "MB" not in text


def test_the_headline_has_a_row_for_each_pair_of_groups(folder, tmp_path):
    make_group(tmp_path / "best", "megalodon", {7: 1.0}, learning_rate=1e-3, sha256="b" * 64)
    make_group(tmp_path / "best", "llama", {7: 1.2}, learning_rate=2e-3, sha256="b" * 64)
    best = [one_group([f"best/{model}*"], tmp_path) for model in ("megalodon", "llama")]
    pair = [one_group([f"{model}*"], folder) for model in ("megalodon", "llama")]
    text = headline("as published", *pair, "another text", *best, timing())
    assert len(text.splitlines()) == 2 + 6
    assert row(text, "parameters")[1:3] == ["1,000", "1,100"]
    assert row(text, f"as published, after 410 s of training {ON}")[2] == "2.8547 ± 0.0347"
    step = ["1.000; 2,000", "1.500; 1,000", "−0.500; +1,000", "–", "−33.33 %; +100.00 %"]
    assert row(text, f"a step, s; peak memory, MB, {ON}")[1:] == step
    assert row(text, "as published")[:2] == ["7, 8, 9", "2.0342 ± 0.0144"]
    assert row(text, f"another text, after 410 s of training {ON}")[:2] == ["7", "1.4427"]
    assert row(text, "another text") == ["7", "1.4427", "1.7312", "−0.2885", "–", "−16.67 %"]
    with pytest.raises(UserError, match="cannot stand in one table: text is sample"):
        headline("two texts", pair[0], best[1])
    assert len(headline("another text", *best).splitlines()) == 2 + 1


def test_a_table_of_anything_tells_what_differs(folder):
    make_run(folder / "short", num_batches=200, loss=line(3.0, 2.0, 200), chunk_size=64)
    text = runs(find_groups(["megalodon*", "short", "llama*"], folder))
    head = [cell.strip() for cell in text.splitlines()[0].split("|")[1:-1]]
    cells = [[cell.strip() for cell in each.split("|")[1:-1]] for each in text.splitlines()[2:]]
    column = {name: [each[i] for each in cells] for i, name in enumerate(head)}
    assert column["model"] == ["Megalodon", "Megalodon", "Llama"]
    assert column["chunk_size"] == ["256", "64", "–"]  # which a Llama has not
    assert column["num_batches"] == ["400", "200", "400"]
    assert column["seeds"] == ["7, 8, 9", "7", "7, 8, 9"]
    assert column["loss after 200 steps"] == ["2.2050 ± 0.0050", "2.0000", "2.2350 ± 0.0180"]
    assert column["loss − the first's"] == ["–", "−0.2000", "+0.0300"]  # 2.0 - 2.2 of seed 7
    assert "BPC of the whole split" not in column  # after different numbers of steps


def test_one_run_of_anything_makes_a_table_and_a_picture(tmp_path, capsys):
    run, picture = make_run(tmp_path / "run"), tmp_path / "curve.svg"
    assert main([str(run), "--picture", str(picture)]) == 0
    assert "| Megalodon | 7 | 1,000 | 1.0000 |" in capsys.readouterr().out
    assert "<svg" in picture.read_text()


def test_a_sample_stays_within_its_fence(folder):
    shown = sample(one_group(["llama_7"], folder)).split("\n")
    assert shown == ["~~~~text", "A prompt, and llama: ~~~  ?", "~~~~"]


def test_a_search_is_shown_by_what_it_varied_with_each_best_in_bold():
    def found(model, loss, **settings):
        return {"model": model, "settings": {"seed": 7, **settings}, "val_loss": loss}

    text = search(
        [
            found("megalodon", 1.5, beta2=0.9, init_mode="he"),
            found("llama", 1.7, beta2=0.9),
            found("megalodon", 1.4, beta2=0.99, init_mode="he"),
            found("llama", 1.6, beta2=0.99),
        ]
    )
    assert text.splitlines()[2:] == [
        "| Megalodon | 0.9 | 1.5000 | 2.1640 |",
        "| Megalodon | 0.99 | **1.4000** | 2.0198 |",
        "| Llama | 0.9 | 1.7000 | 2.4526 |",
        "| Llama | 0.99 | **1.6000** | 2.3083 |",
    ]


def test_a_benchmark_is_a_table_for_each_kind_of_row():
    both = {"kind": "train", "seq_len": 512}
    rows = [
        {
            **both,
            "compile": False,
            "megalodon": {"step, s": 1, "by_name": {}},
            "llama": {"MB": 2.5},
        },
        {**both, "compile": True, "failed": {"train, llama": "out of memory"}},
        {"kind": "decode", "megalodon": {"bytes/s": 12345.6, "state, MB": 0.01}},
    ]
    assert measured_tables({"device": "cpu", "threads": 2, "rows": rows}).split("\n\n") == [
        "device cpu, threads 2:",
        "kind train, seq_len 512:",
        "| compile | of | step, s | MB |\n| --- | --- | --- | --- |\n"
        "| False | megalodon | 1 | – |\n| False | llama | – | 2.50 |",
        "Given up: True, train, llama: out of memory.",
        "kind decode:",
        "| of | bytes/s | state, MB |\n| --- | --- | --- |\n| megalodon | 12,346 | 0.0100 |",
    ]


def test_a_range_of_distances_ends_where_the_window_does():
    ranges = [{"to": 32, "bpc": 3.0}, {"to": 128, "bpc": 2.0}]
    result = {"checkpoint": "run/final.pt", "bpc": 2.5, "by_distance": ranges}
    for reading, end in (({"context": 100, "stride": 100}, 100), ({"streams": 64}, 128)):
        figure = draw_distances([{**result, "reading": reading}])
        assert list(figure.axes[0].get_lines()[0].get_xdata()) == [32, end]
