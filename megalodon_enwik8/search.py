"""The search for each model's best settings, key by key:

python -m megalodon_enwik8.search results/search.yaml

writes results/search.jsonl: a line is one run, with its model, what was set, and its validation
losses. Runs that have a line are not made again, so that a search that was stopped goes on with
the same command.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalodon_enwik8.config import ExperimentConfig, load_config, model_of_key, read_yaml
from megalodon_enwik8.safety import Parser, UserError, run_main

Settings = dict[str, Any]


class Plan(BaseModel):
    """A search's YAML file."""

    model_config = ConfigDict(extra="forbid")

    base: dict[str, str] = Field(min_length=1)  # a model's config file
    start: Settings = Field(alias="with")  # what all runs set besides, until a round finds better
    rounds: list[dict[str, list[Any]]] = Field(min_length=1)  # in each: a key and its values


def read_plan(path: str) -> Plan:
    try:
        plan = Plan(**read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}") from None
    unknown = {
        key for values in plan.rounds for key in values
    } - ExperimentConfig.model_fields.keys()
    if unknown:
        raise UserError(f"{path}: rounds try {sorted(unknown)[0]}, which is no key of a config")
    for model in plan.base:
        for number, values in enumerate(plan.rounds, 1):
            own = own_keys(values, model)
            if len(own) != 1:
                raise UserError(
                    f"{path}: round {number} tries {', '.join(values)}, of which a {model} has "
                    f"{len(own)}: give each model one key in a round"
                )
    counts = {m: [len(values) for _, values in tries(plan, m)] for m in plan.base}
    if len({tuple(numbers) for numbers in counts.values()}) > 1:
        raise UserError(f"{path}: not the same number of tries for each model: {counts}")
    return plan


def own_keys(values: Settings, model: str) -> list[str]:
    """The keys of a round that a model has."""
    return [key for key in values if model_of_key(key) in (None, model)]


def tries(plan: Plan, model: str) -> list[tuple[str, list[Any]]]:
    """The key of each round, and its values."""
    return [(key, values[key]) for values in plan.rounds for key in own_keys(values, model)]


def set_keys(plan: Plan, model: str) -> list[str]:
    """What the runs of a model set, in all rounds together."""
    return sorted({key for key, _ in tries(plan, model)} | plan.start.keys())


def read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise UserError(f"{path}: is not the output of a search; name another --out") from None


def search(plan: Plan, out: Path, folder: Path) -> int:
    """Make the runs that `out` has no line of yet. Returns the exit code of the last one."""
    # Imported late: torch takes seconds to load, and the plan's mistakes are known before.
    from megalodon_enwik8.run_folder import NEWEST
    from megalodon_enwik8.training import train

    out.parent.mkdir(parents=True, exist_ok=True)
    best = {model: dict(plan.start) for model in plan.base}
    for number in range(len(plan.rounds)):
        for model in plan.base:
            key, values = tries(plan, model)[number]
            losses = {}
            for value in values:
                config = plan_config(plan, model, {**best[model], key: value}, folder)
                settings = {k: getattr(config, k) for k in set_keys(plan, model)}
                found = find(read_results(out), model, settings)
                if found is None:
                    print(f"\n{model}: {key}={value}", flush=True)
                    if code := train(config, resume=NEWEST):
                        return code
                    run_dir = Path(config.run_dir)
                    found = {"model": model, "settings": settings, **read_losses(run_dir)}
                    with out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    shutil.rmtree(run_dir)
                losses[json.dumps(value)] = found["val_loss"]
            chosen = min(losses, key=lambda value: losses[value])
            best[model][key] = json.loads(chosen)
            said = ", ".join(f"{value} {loss:.4f}" for value, loss in losses.items())
            print(f"{model}: {key}: {said}; best {chosen}", flush=True)
    return 0


def plan_config(plan: Plan, model: str, settings: Settings, folder: Path) -> ExperimentConfig:
    """The config of one run, in a folder that is called after what the rounds try."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = load_config(plan.base[model], overrides)
    tried = sorted({key for key, _ in tries(plan, model)})
    name = "_".join([model, *(str(getattr(config, key)) for key in tried)])
    return config.model_copy(update={"run_dir": str(folder / name)})


def find(results: list[dict[str, Any]], model: str, settings: Settings) -> dict[str, Any] | None:
    same = (row for row in results if (row["model"], row["settings"]) == (model, settings))
    return next(same, None)


def read_losses(run_dir: Path) -> dict[str, Any]:
    """The validation losses of a finished run, and where it was made."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    environment = json.loads((run_dir / "environment.json").read_text())
    curve = {str(row["step"]): round(row["val_loss"], 5) for row in rows if "val_loss" in row}
    commit = environment["sessions"][-1].get("commit")
    return {"val_loss": rows[-1]["val_loss"], "curve": curve, "commit": commit}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m megalodon_enwik8.search", description=__doc__)
    parser.add_argument("plan", help="a YAML file: base, with, rounds")
    parser.add_argument("--out", metavar="FILE", help="by default the plan's name with .jsonl")
    parser.add_argument("--folder", default="runs/search", metavar="DIR", help="of runs underway")
    options = parser.parse_args(argv)
    out = Path(options.out or Path(options.plan).with_suffix(".jsonl"))
    return search(read_plan(options.plan), out, Path(options.folder))


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
