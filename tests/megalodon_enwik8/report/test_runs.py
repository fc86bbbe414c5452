"""Run folders are read as they were written, grouped by what was set, and refused by name."""

import json
from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_enwik8.config import FREE_KEYS, ExperimentConfig, load_config
from megalodon_enwik8.report.__main__ import main
from megalodon_enwik8.report.runs import (
    check_comparable,
    find_groups,
    group_names,
    one_group,
    read_run,
)
from megalodon_enwik8.safety import UserError

from ..programs import refused
from .run_folders import make_run

ROOT = Path(__file__).parents[3]


def test_a_run_is_read_as_training_wrote_it(tmp_path):
    run = read_run(make_run(tmp_path / "run", seed=8))
    assert (run.seed, run.steps, run.parameters, run.bytes_a_step) == (8, 400, 1000, 8192)
    assert run.losses == {0: 3.0, 100: 2.5, 200: 2.0, 300: 1.5, 400: 1.0}
    assert (run.device, run.peak_megabytes) == ("cpu (2 of 2 cores)", 300.0)
    assert run.full_val_bpc == pytest.approx(1.1 / 0.6931472)


def test_keys_that_a_config_lacks_have_the_schemas_defaults(tmp_path):
    old = read_run(make_run(tmp_path / "old"))
    new = read_run(make_run(tmp_path / "new", beta2=0.999, optimizer="adam"))
    assert old.recipe == new.recipe
    assert old.recipe["learning_rate"] == ExperimentConfig.model_fields["learning_rate"].default
    assert "heads" not in old.recipe  # a key of the other model


def test_groups_are_the_same_for_any_order_of_runs_and_names_of_seeds(tmp_path):
    names = []
    for model in ("megalodon", "llama"):
        for seed in (9, 7, 8):
            names.append(f"{model}{seed}")
            make_run(tmp_path / names[-1], model, seed)
    make_run(tmp_path / "other", learning_rate=0.1)

    @settings(max_examples=10, deadline=None)
    @given(st.permutations([*names, "other"]))
    def same_groups(order):
        groups = find_groups(order, tmp_path)
        found = {tuple(str(run.path) for run in group) for group in groups}
        assert found == {
            ("megalodon7", "megalodon8", "megalodon9"),
            ("llama7", "llama8", "llama9"),
            ("other",),
        }
        assert str(groups[0][0].path)[:5] == order[0][:5]

    same_groups()


def test_keys_that_leave_the_course_alone_do_not_part_a_group(tmp_path):
    assert ExperimentConfig.model_fields.keys() >= FREE_KEYS
    make_run(tmp_path / "a", seed=7)
    changes = {"batch_size": 16, "grad_accum_every": 1, "compile": True, "save_every": 3}
    make_run(
        tmp_path / "b",
        seed=8,
        **changes,
        generate_every=0,
        keep_last=1,
        data_path="x",
        tracker="tensorboard",
    )
    assert [run.seed for run in one_group(["*"], tmp_path)] == [7, 8]


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"chunk_size": 64}, {"dropout": 0.1}])
def test_any_other_key_parts_them_and_is_named(tmp_path, change):
    make_run(tmp_path / "a", seed=7)
    make_run(tmp_path / "b", seed=8, **change)
    (key, value), *_ = change.items()
    groups = find_groups(["*"], tmp_path)
    assert group_names(groups) == ["Megalodon", f"Megalodon, {key} {value}"]
    with pytest.raises(
        UserError, match=f"two recipes, where one was asked for: {key} is .* {value}"
    ):
        one_group(["*"], tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sha256": "b" * 64}, "text"),
        ({"grad_accum_every": 8}, "bytes_a_step"),
        ({"val_batches": 10}, "val_batches"),
        ({"val_windows": "search"}, "val_windows"),
    ],
)
def test_losses_of_different_things_do_not_stand_in_one_table(tmp_path, change, key, capfd):
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", "llama", **change)
    assert f"cannot stand in one table: {key} is" in refused(capfd, main, *runs)
    check_comparable(find_groups([str(runs[0])]))


def test_one_recipe_and_seed_twice_is_refused(tmp_path, capfd):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert f"{a} and {b}: the same recipe and seed 7 twice" in refused(capfd, main, a, b)
    assert len(one_group([str(a), str(a)])) == 1  # one run, named twice


def damage(folder, name, change):
    path = folder / name
    load, dump = (yaml.safe_load, yaml.safe_dump) if "yaml" in name else (json.loads, json.dumps)
    content = load(path.read_text())
    change(content)
    path.write_text(dump(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "has no config.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: damaged"),
        (lambda run: (run / "config.yaml").write_text("[1, 2]"), "damaged"),
        (
            lambda run: damage(run, "config.yaml", lambda c: c.pop("model")),
            "damaged: KeyError: 'model'",
        ),
        (lambda run: damage(run, "config.yaml", lambda c: c.update(batch_size="x")), "damaged"),
        (lambda run: damage(run, "config.yaml", lambda c: c.update(d=date(2020, 1, 1))), "damaged"),
        (lambda run: (run / "environment.json").write_bytes(b"\xff\x00"), "damaged"),
        (lambda run: damage(run, "environment.json", lambda e: e.pop("corpus")), "'corpus'"),
        (lambda run: damage(run, "environment.json", lambda e: e.update(sessions=[3])), "damaged"),
        (lambda run: damage(run, "environment.json", lambda e: e.update(sessions=[])), "damaged"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "not finished: 0 of 400 steps"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "damaged: KeyError: 'step'"),
        (lambda run: (run / "metrics.jsonl").write_text("?\n"), "metrics.jsonl: damaged"),
    ],
)
def test_a_run_folder_that_is_not_whole_is_refused_in_a_line(tmp_path, spoil, message, capfd):
    run = make_run(tmp_path / "run")
    spoil(run)
    said = refused(capfd, main, run)
    assert str(run) in said
    assert message in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut_at": 250}, "not finished: 201 of 400 steps; go on with --resume"),
        ({"end": {"train_loss": 1.0}}, "not finished"),
        ({"end": {"val_loss": None}}, "no validation at the end"),
        ({"end": {"val_loss": float("nan")}}, "no numbers or not in their order"),
        ({"end": {"full_val_loss": "low"}}, "damaged"),
    ],
)
def test_a_run_without_its_end_is_refused_in_a_line(tmp_path, options, message, capfd):
    run = make_run(tmp_path / "run", **options)
    assert message in refused(capfd, main, run)


def test_what_is_not_there_is_refused_in_a_line(tmp_path, capfd):
    assert "nothing*: matches nothing" in refused(capfd, main, tmp_path / "nothing*")
    (tmp_path / "file").touch()
    assert "file: no such run folder" in refused(capfd, main, tmp_path / "file")
    assert "name run folders, or pages" in refused(capfd, main)
    for number, text in enumerate(("[]", '{"device": "x"}')):
        (tmp_path / "a timing.json").write_text(text)
        given = (make_run(tmp_path / f"run{number}"), "--timing", tmp_path / "a timing.json")
        assert f"run{number}: the benchmark has no such step" in refused(capfd, main, *given)
    (tmp_path / "x.jsonl").touch()
    given = (tmp_path / "run0", "--timing", tmp_path / "x.jsonl")
    assert "x.jsonl: is empty" in refused(capfd, main, *given)
    given = ("--check", tmp_path / "page.md", *given[1:])
    assert "--picture and --timing go with run folders" in refused(capfd, main, *given)


def test_committed_runs_can_be_made_again():
    configs = sorted(ROOT.glob("results/*/*/config.yaml"))
    assert configs
    for config in configs:
        load_config(config)
