"""Made-up run folders, as training writes them, and ways to read what the report says of them."""

import json

import yaml

PARAMETERS = {"megalodon": 1000, "llama": 1100}


def line(start, end, steps=400):
    """A loss that falls in a straight line, on which reading between points is exact."""
    return lambda step: start + (end - start) * step / steps


def make_run(
    folder,
    model="megalodon",
    seed=7,
    *,
    loss=None,
    step_seconds=2.0,
    sha256="a" * 64,
    cut_at=None,
    session=None,
    end=None,
    **config,
):
    """A run of 400 steps, with a line for every hundredth. `cut_at`: it ended there, unfinished."""
    used = {
        "run_dir": str(folder), "model": model, "seed": seed, "num_batches": 400,
        "batch_size": 4, "grad_accum_every": 4, "val_batches": 100, **config,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(used))
    began = {"device": "cpu (2 of 2 cores)", "threads": 2, "torch": "2.13.0", "commit": "c" * 40}
    environment = {
        "corpus": {"name": "sample", "sha256": sha256},
        "parameters": PARAMETERS[model],
        "sessions": [{**began, **(session or {})}],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    steps, loss = used["num_batches"], loss or line(3.0, 1.0, used["num_batches"])
    rows = [
        {
            "step": step,
            "train_loss": 1.0,
            "val_loss": loss(step),
            "seconds": (step + 1) * step_seconds,
            "tokens_per_second": 16 * 512 / step_seconds,
            "peak_memory_bytes": step * 10**6,
        }
        for step in range(0, steps if cut_at is None else cut_at, 100)
    ]
    if cut_at is None:
        last = {"step": steps, "val_loss": loss(steps), "seconds": steps * step_seconds}
        last |= {"full_val_loss": loss(steps) + 0.1, "sample": f"A prompt, and {model}:\n~~~~ \x1b"}
        rows.append({**last, **(end or {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_group(folder, model, ends, **options):
    """Runs that fall from 3 to the loss of each seed. Returns a glob of them."""
    for seed, end in ends.items():
        make_run(folder / f"{model}_{seed}", model, seed, loss=line(3.0, end), **options)
    return f"{folder.name}/{model}_*"


def row(text, title):
    """The cells behind the first one, of the first row that begins with it."""
    return next(
        cells[2:-1]
        for cells in ([cell.strip() for cell in each.split("|")] for each in text.splitlines())
        if cells[1:2] == [title]
    )
