"""The search for each model's best settings, key by key:

python -m megalodon_enwik8.search results/search.yaml

writes results/search.jsonl: a line is one run, with its model, what was set, and its validation
losses. Runs that have a line are not made again, so that a search that was stopped goes on with
the same command.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalodon_enwik8.config import FREE_KEYS, ExperimentConfig, has_key, make_config, read_yaml
from megalodon_enwik8.safety import Parser, UserError, atomic_write, run_main

Settings = dict[str, Any]


class Plan(BaseModel):
    """A search's YAML file."""

    model_config = ConfigDict(extra="forbid")

    base: dict[str, str] = Field(min_length=1)  # a model's config file
    start: Settings = Field(alias="with")  # what all runs set besides, until a round finds better
    # In each: a key and its values
    rounds: list[dict[str, Annotated[list[Any], Field(min_length=1)]]] = Field(min_length=1)

    def tries(self, model: str) -> list[tuple[str, list[Any]]]:
        """The key of each round that the model has, and its values."""
        pairs = [pair for values in self.rounds for pair in values.items()]
        return [(key, values) for key, values in pairs if has_key(model, key)]

    def set_keys(self, model: str) -> list[str]:
        """What the runs of a model set, in all rounds together."""
        return sorted({key for key, _ in self.tries(model)} | self.start.keys())

    def config(self, model: str, settings: Settings, folder: Path) -> ExperimentConfig:
        """Of one run, in a folder that is called after what the rounds try."""
        values = {**read_yaml(self.base[model]), **settings, "run_dir": str(folder)}
        config = make_config(values, f"{self.base[model]}, as the search sets it")
        if config.model != model:
            raise UserError(f"{self.base[model]}: is of a {config.model}; base has it as {model}")
        tried = sorted({key for key, _ in self.tries(model)})
        name = "_".join([model, *(str(getattr(config, key)) for key in tried)])
        return config.model_copy(update={"run_dir": str(folder / name)})


def read_plan(path: str) -> Plan:
    """Raises UserError for one that does not give each model the same number of tries, or asks for
    a run that cannot be."""
    try:
        plan = Plan.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}") from None
    for number, values in enumerate(plan.rounds, 1):
        if fixed := {"model", "run_dir"} & (values.keys() | plan.start.keys()):
            raise UserError(f"{path}: {min(fixed)}: the search sets it; leave it out")
        if unknown := values.keys() - ExperimentConfig.model_fields.keys():
            raise UserError(f"{path}: rounds try {min(unknown)}, which is no key of a config")
        counts = [
            [len(tried) for key, tried in values.items() if has_key(model, key)]
            for model in plan.base
        ]
        if any(count != counts[0] or len(count) != 1 for count in counts):
            raise UserError(
                f"{path}: round {number}: {' and '.join(plan.base)} have {counts} values: give "
                "each model one key in a round, and as many values as the other"
            )
    for model in plan.base:
        for key, tried in plan.tries(model):
            for value in tried:
                plan.config(model, {**plan.start, key: value}, Path())
    return plan


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is none; without one that a full disk cut off."""
    try:
        *whole, last = path.read_text().split("\n") if path.exists() else [""]
        rows = [json.loads(line) for line in whole]
        if not all(isinstance(row, dict) for row in rows) or not last.startswith("{"[: len(last)]):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: is not what this writes; name another file") from None
    return rows


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row."""
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def search(plan: Plan, out: Path, folder: Path) -> int:
    """Make the runs that `out` has no line of yet. Returns the exit code of the last one."""
    # Imported late: torch takes seconds to load, and the plan's mistakes are known before.
    from megalodon_enwik8.run_folder import NEWEST
    from megalodon_enwik8.training import STOPPED, train

    out.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(out)
    best = {model: dict(plan.start) for model in plan.base}
    for number in range(len(plan.rounds)):
        for model in plan.base:
            key, values = plan.tries(model)[number]
            losses = []
            for value in values:
                config = plan.config(model, {**best[model], key: value}, folder)
                settings = {name: getattr(config, name) for name in plan.set_keys(model)}
                wanted = {"model": model, "settings": settings}
                row = next((row for row in results if row | wanted == row), None)
                rest = digest_of_rest(config, settings)
                if row and row.get("rest", rest) != rest:
                    raise UserError(
                        f"{out}: has a run of {config.run_dir} with another {plan.base[model]}: "
                        "name another file with --out"
                    )
                if row is None:
                    print(f"\n{model}: {key}={value}", flush=True)
                    try:
                        code = train(config, resume=NEWEST)
                    except UserError as error:
                        if STOPPED not in str(error):
                            raise
                        raise UserError(f"{error}; or take {value} out of the plan") from None
                    if code:
                        return code
                    row = {**wanted, "rest": rest, **read_losses(Path(config.run_dir))}
                    results.append(row)
                    write_results(out, results)
                    shutil.rmtree(config.run_dir)
                losses.append(row["val_loss"])
            best[model][key] = values[losses.index(min(losses))]
            said = ", ".join(f"{v} {loss:.4f}" for v, loss in zip(values, losses, strict=True))
            print(f"{model}: {key}: {said}; best {best[model][key]}", flush=True)
    return 0


def digest_of_rest(config: ExperimentConfig, settings: Settings) -> str:
    """Of what a run's course depends on besides the settings: a base may change between calls."""
    known = FREE_KEYS - {"data_path", "data_bytes"} | settings.keys()
    fields = type(config).model_fields  # what has its default may be of a key that is new
    rest = {k: v for k, v in config.used().items() if k not in known and v != fields[k].default}
    text = json.dumps([rest, config.sequences_per_step])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_losses(run_dir: Path) -> dict[str, Any]:
    """The validation losses of a finished run, and where it was made."""
    from megalodon_enwik8.run_folder import read_metrics

    rows = read_metrics(run_dir / "metrics.jsonl")
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
    run_main(main)
