"""A search: the same tries for each model, a line a run, and it goes on where it was stopped."""

import json
from pathlib import Path

import pytest

from megalodon_enwik8 import search, training
from megalodon_enwik8.safety import UserError


@pytest.fixture
def make_plan(tmp_path, make_tiny):
    """make_plan(**changes): the path of a plan for both models."""

    def make(**changes):
        base = {}
        for model in ("megalodon", "llama"):
            path = tmp_path / f"{model}.yaml"
            path.write_text(make_tiny(model).to_yaml())
            base[model] = str(path)
        plan = {
            "base": base,
            "with": {"num_batches": 2, "optimizer": "adamw", "val_windows": "search"},
            "rounds": [
                {"learning_rate": [1e-3, 3e-3]},
                {"init_mode": ["he", "fan_in"], "llama_init": ["transformers", "fan_in"]},
                {"learning_rate": [3e-3, 1e-2]},
            ],
            **changes,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(json.dumps(plan))  # JSON is YAML
        return str(path)

    return make


def run(path, tmp_path):
    out = tmp_path / "out.jsonl"
    assert search.main([path, "--out", str(out), "--folder", str(tmp_path / "runs")]) == 0
    return search.read_results(out)


def test_each_model_gets_the_same_tries_and_each_round_starts_from_the_best(make_plan, tmp_path):
    rows = run(make_plan(), tmp_path)
    assert not list((tmp_path / "runs").iterdir())  # what they hold is in the output
    for model, key in (("megalodon", "init_mode"), ("llama", "llama_init")):
        mine = [row for row in rows if row["model"] == model]
        # The first round's best and the second's first try are one run, made once.
        assert len(mine) <= 5
        found = [row["settings"] for row in mine]
        assert len({json.dumps(settings) for settings in found}) == len(found)
        first = min(mine[:2], key=lambda row: row["val_loss"])["settings"]
        assert {**first, key: "fan_in"} in found
        assert set(mine[0]["curve"]) == {"0", "2"}


@pytest.mark.parametrize("cut", [0, 40, -1])
def test_a_search_that_was_stopped_goes_on(make_plan, tmp_path, monkeypatch, cut):
    """Also where a full disk had cut its last line off."""
    whole = run(make_plan(), tmp_path)
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:3]) + lines[3][:cut])
    trained = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda config, **options: trained.append(config) or train(config)
    )
    assert run(make_plan(), tmp_path) == whole
    assert len(trained) == len(whole) - 3
    monkeypatch.setattr(training, "train", lambda config, **options: 130)
    (tmp_path / "out.jsonl").unlink()
    assert search.main([make_plan(), "--out", str(tmp_path / "out.jsonl")]) == 130


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rounds": [{"chunk_size": [4]}]}, "megalodon and llama have [[1], []] values: give each"),
        ({"rounds": [{"lerning_rate": [4]}]}, "rounds try lerning_rate, which is no key"),
        ({"rounds": [{"beta2": [0.9], "seed": [1]}]}, "have [[1, 1], [1, 1]] values"),
        ({"rounds": [{"beta2": [0.9, 1.5]}]}, "as the search sets it: beta2=1.5: Input should be"),
        ({"rounds": []}, "rounds: List should have at least 1 item"),
        ({"rounds": [{"beta2": []}]}, "rounds.0.beta2: List should have at least 1 item"),
        ({"rounds": [{"run_dir": ["a"]}]}, "run_dir: the search sets it; leave it out"),
        ({"with": {"model": "llama"}}, "model: the search sets it; leave it out"),
        ({"base": {}}, "base: Dictionary should have at least 1 item"),
        ({"steps": 3}, "steps: Extra inputs are not permitted"),
        (
            {"rounds": [{"init_mode": ["he"], "llama_init": ["fan_in", "pytorch"]}]},
            "have [[1], [2]] values: give each model one key",
        ),
    ],
)
def test_a_plan_that_is_none_is_refused(make_plan, tmp_path, changes, line):
    with pytest.raises(UserError, match=r"\.yaml") as caught:
        run(make_plan(**changes), tmp_path)
    assert line in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_runs_of_another_base_are_not_taken_for_its_own(make_plan, tmp_path):
    path = make_plan()
    rows = run(path, tmp_path)
    base = tmp_path / "megalodon.yaml"
    base.write_text(base.read_text().replace("save_every: 2", "save_every: 3"))
    assert run(path, tmp_path) == rows  # which leaves the course of a run alone
    base.write_text(base.read_text().replace("cema_ndim: 2", "cema_ndim: 4"))
    with pytest.raises(UserError, match=r"with another .*megalodon.yaml: name another file with"):
        run(path, tmp_path)
    for row in rows:
        del row["rest"]  # as in files from before
    search.write_results(tmp_path / "out.jsonl", rows)
    assert run(path, tmp_path) == rows


def test_a_try_that_diverges_is_named(make_plan, tmp_path):
    plan = make_plan(rounds=[{"learning_rate": [1e-3, 1e30]}])
    with pytest.raises(UserError, match=r"lower learning_rate.*; or take 1e\+30 out of the plan"):
        run(plan, tmp_path)


def test_a_model_is_not_searched_under_the_others_name(make_plan, tmp_path):
    path = Path(make_plan())
    plan = json.loads(path.read_text())
    plan["base"]["llama"] = plan["base"]["megalodon"]
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"\.yaml: is of a megalodon; base has it as llama"):
        run(str(path), tmp_path)


def test_the_committed_plans_are_some_and_their_runs_are_of_them():
    paths = [*(Path(__file__).parents[2] / "results").glob("search*.yaml")]
    assert len(paths) == 3
    for path in paths:
        plan, rows = search.read_plan(str(path)), search.read_results(path.with_suffix(".jsonl"))
        assert all([*row["settings"]] == plan.set_keys(row["model"]) for row in rows)


@pytest.mark.parametrize("text", ["my notes\n", "my notes", "5\n"])
def test_another_file_is_not_written_to(make_plan, tmp_path, text):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(UserError, match="is not what this writes; name"):
        run(make_plan(), tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == text
