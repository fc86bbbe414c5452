"""Runs sorted into what may stand in one table.

A run's place follows from its config, never from the name of its folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from megalodon_enwik8.data import ENWIK8, ENWIK8_DATA_BYTES
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.report_runs import MODELS, PROTOCOL, Contender, Group, Run, Setting

_TUNED_KEYS = frozenset({"learning_rate", "schedule", "warmup_steps", "carry_state", "carry_steps"})
_VARIANT_KEYS = {
    "megalodon": ("ablation", "chunk_size", "cema_ndim"),
    "llama": ("llama_init",),
}
_ABLATIONS = {"no_cema": "without CEMA", "layer_norm": "LayerNorm in place of TimestepNorm"}


@dataclass(frozen=True)
class Entrant:
    """A model with its own setting, in the second table."""

    contender: Contender
    setting: Setting
    group: Group
    finalists: Mapping[Setting, Group]  # all its settings that were run to the end

    @property
    def common_seeds(self) -> list[int]:
        """Those that every finalist has."""
        return _common_seeds(self.finalists)


@dataclass(frozen=True)
class Tuned:
    """Each model at its own best setting, and how that was found."""

    grid_steps: int  # 0: no grid is given
    grid: Mapping[Contender, Mapping[Setting, float]]  # mean validation loss at grid_steps
    grid_seeds: Sequence[int]
    entrants: Mapping[Contender, Entrant]


@dataclass(frozen=True)
class Variant:
    """A Megalodon that lacks something, or has another size of chunk or N; a Llama that starts
    otherwise."""

    model: str
    name: str
    group: Group


@dataclass(frozen=True)
class Study:
    """All runs, each in its place."""

    protocol: Mapping[str, Group]
    enwik8: Mapping[str, Group] = field(default_factory=dict)  # beside the published table
    tuned: Tuned | None = None
    variants: Sequence[Variant] = ()
    runs: Sequence[Run] = ()  # all, in the order of the tables

    @property
    def first(self) -> Run:
        """A run that speaks for all of the protocol's: they agree in what is asked of it."""
        group = self.protocol["megalodon"]
        return group[min(group)]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.protocol["megalodon"])


def arrange(runs: Iterable[Run]) -> Study:
    """Put each run in its table.

    Raises UserError for a run that belongs in none, runs that cannot stand in one table, two
    that are the same, and a seed that one model of a table lacks.
    """
    protocol: list[Run] = []
    tuned: list[Run] = []
    ablated: list[Run] = []
    for run in sorted(runs, key=_order):
        _place(run, protocol, tuned, ablated).append(run)
    if not protocol:
        raise UserError(
            "no run has the settings of the protocol, with which the others are compared: add "
            "runs of configs/megalodon_sample.yaml and configs/llama_sample.yaml"
        )
    enwik8 = [run for run in protocol if _fills_the_published_table(run)]
    main = [run for run in protocol if run not in enwik8] or enwik8
    steps = max(run.steps for run in main)
    tuned_lengths = {run.steps for run in tuned}
    short = [run for run in main if run.steps < steps and run.steps in tuned_lengths]
    main = [run for run in main if run not in short]
    _check_agreement(main)
    if enwik8:
        _check_agreement(enwik8)
    groups = {model: _group(run for run in main if run.settings.model == model) for model in MODELS}
    _check_seeds(groups)
    for run in (*short, *tuned, *ablated):
        _check_agreement([main[0], run], but="steps")
    return Study(
        protocol=groups,
        enwik8={
            model: _group(found)
            for model in MODELS
            if (found := [run for run in enwik8 if run.settings.model == model])
        },
        tuned=_arrange_tuned(groups, short + tuned, steps) if tuned else None,
        variants=_arrange_variants(groups, ablated),
        runs=[*main, *(run for run in enwik8 if run not in main), *short, *tuned, *ablated],
    )


def _order(run: Run) -> tuple[Any, ...]:
    settings = run.settings
    return (
        MODELS.index(settings.model),
        settings.carry_state,
        _variant_order(run),
        run.steps,
        run.setting,
        run.seed,
        str(run.path),
    )


def _place(run: Run, protocol: list[Run], tuned: list[Run], ablated: list[Run]) -> list[Run]:
    keys = set(run.differences)
    if not keys:
        return protocol
    if keys <= _TUNED_KEYS:
        return tuned
    if keys <= set(_VARIANT_KEYS[run.settings.model]):
        return ablated
    changes = ", ".join(f"{key}={str(run.differences[key])[:60]}" for key in sorted(keys))
    raise UserError(
        f"{run.path}: belongs in no table: differs from the protocol in {changes}; one table is "
        f"for changes of {', '.join(sorted(_TUNED_KEYS))}, one for a Megalodon's "
        f"{', '.join(_VARIANT_KEYS['megalodon'])} and a Llama's "
        f"{', '.join(_VARIANT_KEYS['llama'])}"
    )


def _fills_the_published_table(run: Run) -> bool:
    return (
        run.environment.corpus.name == ENWIK8.name
        and run.environment.corpus.size == ENWIK8_DATA_BYTES
        and run.steps == PROTOCOL["num_batches"]
        and run.settings.seq_len == PROTOCOL["seq_len"]
        and run.settings.sequences == PROTOCOL["batch_size"] * PROTOCOL["grad_accum_every"]
    )


def _check_agreement(runs: Sequence[Run], but: str = "") -> None:
    """Raise UserError unless the runs may stand in one table."""

    def facts(run: Run) -> dict[str, Any]:
        return {
            "text": f"{run.environment.corpus.name} ({run.environment.corpus.sha256[:12]}...)",
            "bytes in a sequence": run.settings.seq_len,
            "bytes in a step": run.bytes_per_step,
            "windows to validate on": run.settings.val_batches,
            "steps": run.steps,
        }

    first = facts(runs[0])
    for run in runs[1:]:
        for name, value in facts(run).items():
            if value != first[name] and name != but:
                raise UserError(
                    f"{runs[0].path} and {run.path} cannot stand in one table: {name}: "
                    f"{first[name]} in the first, {value} in the second"
                )


def _group(runs: Iterable[Run]) -> Group:
    """Runs that differ in their seeds alone. Raises UserError for two of one seed."""
    group: dict[int, Run] = {}
    for run in runs:
        if run.seed in group:
            raise UserError(
                f"{group[run.seed].path} and {run.path} are of the same settings and seed "
                f"{run.seed}: leave one out"
            )
        group[run.seed] = run
        first = next(iter(group.values()))
        if run.environment.parameters != first.environment.parameters:
            raise UserError(
                f"{first.path} and {run.path} cannot stand in one table: parameters: "
                f"{first.environment.parameters} in the first, {run.environment.parameters} in "
                f"the second"
            )
    return group


def _check_seeds(groups: Mapping[str, Group]) -> None:
    """Raise UserError unless all groups have the same seeds."""
    for name, group in groups.items():
        for other_name, other in groups.items():
            for seed, run in sorted(other.items()):
                if seed not in group:
                    raise UserError(
                        f"{name} has no run with seed {seed}, which {other_name} has "
                        f"({run.path}): add it, or leave that seed out everywhere"
                    )


def _arrange_tuned(protocol: Mapping[str, Group], runs: Sequence[Run], steps: int) -> Tuned:
    too_long = [run for run in runs if run.steps > steps]
    short = [run for run in runs if run.steps < steps]
    if short:
        _check_agreement(short)
    if too_long:
        _check_agreement([next(iter(protocol["megalodon"].values())), too_long[0]])
    grid, grid_seeds = _read_grid(protocol, short)
    finals: dict[Contender, dict[Setting, list[Run]]] = {}
    for run in runs:
        if run.steps == steps:
            finals.setdefault(run.contender, {}).setdefault(run.setting, []).append(run)
    entrants = _enter(finals, grid, protocol, steps) if finals else {}
    _check_streams(run for entrant in entrants.values() for run in entrant.group.values())
    return Tuned(short[0].steps if short else 0, grid, grid_seeds, entrants)


def _read_grid(
    protocol: Mapping[str, Group], runs: Sequence[Run]
) -> tuple[dict[Contender, dict[Setting, float]], list[int]]:
    """The mean loss of each setting, and the seeds. A run of the protocol stands for the first
    part of itself, since its learning rate is constant."""
    if not runs:
        return {}, []
    cells: dict[Contender, dict[Setting, list[Run]]] = {}
    for run in runs:
        cells.setdefault(run.contender, {}).setdefault(run.setting, []).append(run)
    groups = {
        f"{contender.name} at {show_setting(setting)}": _group(found)
        for contender, settings in cells.items()
        for setting, found in settings.items()
    }
    _check_seeds(groups)
    seeds = sorted(next(iter(groups.values())))
    grid = {
        contender: {setting: fmean(run.loss for run in found) for setting, found in row.items()}
        for contender, row in cells.items()
    }
    for model in MODELS:
        own = protocol[model]
        losses = [own[seed].loss_at(runs[0].steps) for seed in seeds if seed in own]
        known = [loss for loss in losses if loss is not None]
        if len(known) == len(seeds):
            setting = next(iter(own.values())).setting
            grid.setdefault(Contender(model, False), {}).setdefault(setting, fmean(known))
    ours, theirs = (grid.get(Contender(model, False), {}) for model in MODELS)
    if len(ours) != len(theirs):
        fewer = MODELS[0] if len(ours) < len(theirs) else MODELS[1]
        lacking = min(set(theirs) - set(ours) if fewer == MODELS[0] else set(ours) - set(theirs))
        raise UserError(
            f"the grid has {len(ours)} settings of {MODELS[0]} and {len(theirs)} of {MODELS[1]}, "
            f"where both must have as many: add {fewer} at {show_setting(lacking)}, say"
        )
    return grid, seeds


def _check_streams(runs: Iterable[Run]) -> None:
    """Raise UserError unless all that were read as streams were read as so many side by side."""
    read = [run for run in runs if run.streams is not None]
    for run in read:
        if run.streams != read[0].streams:
            raise UserError(
                f"{read[0].path} and {run.path} cannot stand in one table: stream.json is of "
                f"{read[0].streams} streams in the first, of {run.streams} in the second"
            )


def best_setting(losses: Mapping[Setting, float]) -> Setting:
    """That of the lowest loss."""
    return min(losses, key=lambda setting: (losses[setting], setting))


def _best(losses: Mapping[Setting, float] | None) -> Setting | None:
    return best_setting(losses) if losses else None


def _enter(
    finals: Mapping[Contender, Mapping[Setting, Sequence[Run]]],
    grid: Mapping[Contender, Mapping[Setting, float]],
    protocol: Mapping[str, Group],
    steps: int,
) -> dict[Contender, Entrant]:
    """One entrant for each contender: the best of its settings that were run to the end, of which
    the grid's best must be one. The protocol's runs are among them where there is a grid."""
    beside = next(run for found in finals.values() for group in found.values() for run in group)
    plain = any(not contender.carried for contender in finals)
    contenders = [Contender(model, False) for model in MODELS]
    contenders += [contender for contender in finals if contender.carried]
    entrants: dict[Contender, Entrant] = {}
    for contender in contenders:
        found = {setting: _group(runs) for setting, runs in finals.get(contender, {}).items()}
        best = _best(grid.get(contender))
        if not grid and len(found) > 1:
            first, second = (next(iter(group.values())) for group in list(found.values())[:2])
            raise UserError(
                f"{first.path} and {second.path} are {contender.name} with different settings, "
                f"and there is no grid to show how they were chosen: give the runs of one, or "
                f"those of the grid"
            )
        own = {} if contender.carried else protocol[contender.model]
        # Without a grid, one model tuned and the other not would be no fair fight.
        if own and (best is not None or not (found or plain)):
            found[next(iter(own.values())).setting] = own
        if not found or (best is not None and best not in found):
            wanted = f" at {show_setting(best)}, the best of its grid" if best is not None else ""
            raise UserError(
                f"{contender.name} has no run of {steps} steps{wanted}, to set beside {beside.path}"
            )
        setting = _best_finalist(contender, found)
        entrants[contender] = Entrant(contender, setting, found[setting], found)
    return _with_like_seeds(entrants, protocol)


def _best_finalist(contender: Contender, finalists: Mapping[Setting, Group]) -> Setting:
    """That of the lowest mean loss over the seeds that all of them have."""
    seeds = _common_seeds(finalists)
    if not seeds:
        first, second = (next(iter(group.values())) for group in list(finalists.values())[:2])
        raise UserError(
            f"the settings of {contender.name} that were run to the end have no seed in common "
            f"({first.path}, {second.path}): add runs of one seed for all of them"
        )
    return best_setting(
        {setting: fmean(group[seed].loss for seed in seeds) for setting, group in finalists.items()}
    )


def _common_seeds(finalists: Mapping[Setting, Group]) -> list[int]:
    return sorted(set.intersection(*(set(group) for group in finalists.values())))


def _with_like_seeds(
    entrants: Mapping[Contender, Entrant], protocol: Mapping[str, Group]
) -> dict[Contender, Entrant]:
    """The protocol's runs, where they enter, with the seeds of the other entrants."""
    tuned = {
        contender.name: entrant.group
        for contender, entrant in entrants.items()
        if entrant.group is not protocol[contender.model]
    }
    _check_seeds(tuned)
    if not tuned:
        return dict(entrants)
    seeds = sorted(next(iter(tuned.values())))
    result: dict[Contender, Entrant] = {}
    for contender, entrant in entrants.items():
        missing = [seed for seed in seeds if seed not in entrant.group]
        if missing:
            raise UserError(
                f"{contender.name} has no run with seed {missing[0]} of the protocol's settings, "
                f"its best, to set beside the other entrants"
            )
        group = {seed: entrant.group[seed] for seed in seeds}
        result[contender] = replace(entrant, group=group)
    return result


def show_setting(setting: Setting) -> str:
    warmup = f", warm-up of {setting.warmup_steps} steps" if setting.warmup_steps else ""
    anew = f", streams anew after {setting.carry_steps} steps" if setting.carry_steps else ""
    return f"learning rate {setting.learning_rate:g}, {setting.schedule}{warmup}{anew}"


def _arrange_variants(protocol: Mapping[str, Group], runs: Sequence[Run]) -> list[Variant]:
    if not runs:
        return []
    _check_agreement(runs)
    names: dict[str, list[Run]] = {}
    for run in runs:
        names.setdefault(_variant_name(run), []).append(run)
    variants = [
        Variant(found[0].settings.model, name, _group(found)) for name, found in names.items()
    ]
    _check_seeds({variant.name: variant.group for variant in variants})
    for run in runs:
        for model in MODELS:
            whole = protocol[model].get(run.seed)
            if whole is None:
                raise UserError(
                    f"{run.path}: the protocol's {model} has no run with seed {run.seed} to "
                    f"compare it with"
                )
            if whole.loss_at(run.steps) is None:
                raise UserError(
                    f"{run.path}: {whole.path}, to compare it with, has no validation after "
                    f"{run.steps} steps"
                )
    return variants


def _variant_order(run: Run) -> tuple[Any, ...]:
    settings = run.settings
    ablations = [*_ABLATIONS, settings.ablation]
    places = {
        "ablation": ablations.index(settings.ablation),
        "chunk_size": settings.chunk_size,
        "cema_ndim": settings.cema_ndim,
        "llama_init": settings.llama_init,
    }
    keys = _VARIANT_KEYS[settings.model]
    return tuple((key not in run.differences, places[key]) for key in keys)


def _variant_name(run: Run) -> str:
    settings = run.settings
    shown = {
        "ablation": _ABLATIONS.get(settings.ablation, settings.ablation),
        "chunk_size": f"chunks of {settings.chunk_size}",
        "cema_ndim": f"N = {settings.cema_ndim}",
        "llama_init": "Llama with PyTorch's initialisation",
    }
    return ", ".join(shown[key] for key in _VARIANT_KEYS[settings.model] if key in run.differences)
