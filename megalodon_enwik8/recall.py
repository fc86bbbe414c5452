"""Whether a model remembers: both learn to say a key's value again, after a gap:

python -m megalodon_enwik8.recall runs/recall.jsonl [KEY=VALUE ...]

Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927). A sequence is PAIRS keys, each
with a value behind it, a gap of other tokens, and the keys in another order, each with its value.
Only those values count. Who knows which values came but not which belongs to which key, and leaves
out those already asked for, is right in half of all cases. Training begins with the shortest gap;
the longer ones come in one after the other. KEY is one of a config, for a model's form or its
optimizer; a model that lacks it takes no part. All in float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from megalodon_enwik8.config import (
    FREE_KEYS,
    ExperimentConfig,
    has_key,
    make_config,
    read_overrides,
)
from megalodon_enwik8.device import choose_device, device_name
from megalodon_enwik8.models import build_model, byte_losses, count_parameters
from megalodon_enwik8.safety import Parser, UserError, run_main, whole_number
from megalodon_enwik8.search import read_results, write_results
from megalodon_enwik8.training import derive_seed, make_optimizer

KEYS, VALUES, OTHERS = 16, 16, 128  # token ids, in this order
PAIRS = 4
CHUNK = 64
GAPS = {16: 0, 32: 0, 64: 1, 128: 2, 256: 4}
"""The lengths of the gap, and how many borders of chunks lie between a key and its return."""

SIZES: dict[str, dict[str, Any]] = {  # of the same depth and width, and nearly as many parameters
    "megalodon": {
        "model_dim": 128, "num_layers": 2, "num_heads": 1, "z_dim": 64, "value_dim": 128,
        "ffn_hidden_dim": 220, "chunk_size": CHUNK, "init_mode": "fan_in",
        "norm_num_groups": 4,  # of 32 channels, as the released models have them
    },
    "llama": {
        "dim": 128, "depth": 2, "heads": 2, "dim_head": 64, "ffn_dim_multiplier": 2.0,
        "llama_init": "fan_in",
    },
}  # fmt: skip
RECIPE = {"optimizer": "adamw", "beta2": 0.95, "weight_decay": 0.1, "schedule": "cosine"}
RATES = (1e-3, 3e-3)
NOT_SERVED = FREE_KEYS | {
    "model", "seed", "num_batches", "learning_rate", "chunk_size", "use_autocast", "seq_len",
    "grad_clip_norm", "val_batches", "val_windows",
}  # fmt: skip
"""Keys that the probe sets, or that say nothing to it."""
TEST_SEQUENCES = 256


def draw(sequences: int, gap: int, seed: int) -> torch.Tensor:
    """(sequences, 4 PAIRS + gap) int64; the values that count stand at ANSWERS."""
    generator = torch.Generator().manual_seed(seed)

    def orders(of: int) -> torch.Tensor:
        return torch.rand(sequences, of, generator=generator).argsort(1)[:, :PAIRS]

    keys = orders(KEYS)
    values = torch.randint(KEYS, KEYS + VALUES, keys.shape, generator=generator)
    pairs = torch.stack([keys, values], dim=2)  # (sequences, PAIRS, 2)
    again = pairs.take_along_dim(orders(PAIRS).unsqueeze(2), dim=1)
    low, high = KEYS + VALUES, KEYS + VALUES + OTHERS
    others = torch.randint(low, high, (sequences, gap), generator=generator)
    return torch.cat([pairs.flatten(1), others, again.flatten(1)], dim=1)


ANSWERS = slice(1 - 2 * PAIRS, None, 2)
"""Where they stand in a sequence, and in what predicts all of it but the first token."""


def gap_of(step: int, steps: int) -> int:
    """The gaps that are in by then take turns; after six tenths of all steps each is."""
    gaps = list(GAPS)
    known = 1 + min(len(gaps) - 1, int(len(gaps) * step / (0.6 * steps)))
    return gaps[step % known]


def config_of(
    model: str, rate: float, seed: int, steps: int, given: dict[str, Any] | None = None
) -> ExperimentConfig:
    run = {"learning_rate": rate, "seed": seed, "num_batches": steps, "warmup_steps": steps // 10}
    own = {key: value for key, value in (given or {}).items() if has_key(model, key)}
    values = {"run_dir": "unused", "model": model, **SIZES[model], **RECIPE, **run, **own}
    return make_config(values, "command line")


def train(config: ExperimentConfig, sequences: int, device: torch.device) -> PreTrainedModel:
    """A model that has learned for `num_batches` steps of so many sequences."""
    model = build_model(config, device)
    optimizer = make_optimizer(model.train(), config)
    steps = config.num_batches
    for step in tqdm(range(steps), unit="step", disable=None):
        batch = draw(sequences, gap_of(step, steps), derive_seed(config.seed, step, "recall"))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        byte_losses(model, batch.to(device))[:, ANSWERS].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, gap: int) -> float:
    """The share of values that are said right, of sequences that no training drew."""
    device = next(model.parameters()).device
    batch = draw(TEST_SEQUENCES, gap, derive_seed(-1, gap, "recall")).to(device)
    said = model(input_ids=batch[:, :-1], use_cache=False).logits[:, ANSWERS].argmax(-1)
    return float((said == batch[:, ANSWERS]).float().mean())


def probe(
    out: Path, seeds: Sequence[int], steps: int, sequences: int, given: dict[str, Any]
) -> None:
    """Train each model that has the given keys at each rate with each seed, and add what it
    remembers to `out`; what is there is not made again."""
    if refused := given.keys() & NOT_SERVED:
        raise UserError(f"command line: {min(refused)}: is not for the probe; leave it out")
    device = choose_device()
    models = [model for model in SIZES if all(has_key(model, key) for key in given)]
    if not models:
        raise UserError(f"command line: no model has {' and '.join(given)}: give one model's keys")
    configs = [
        config_of(model, rate, seed, steps, given)
        for seed in seeds
        for rate in RATES
        for model in models
    ]
    rows = read_results(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for config in configs:
        key = {name: getattr(config, name) for name in ("model", "learning_rate", "seed")}
        key |= {"steps": steps, "sequences": sequences, "chunk": CHUNK, "given": given}
        if any(row | key == row for row in rows):
            continue
        began = time.perf_counter()
        model = train(config, sequences, device)
        row: dict[str, Any] = {
            **key,
            "parameters": count_parameters(model),
            "accuracy": {str(gap): accuracy(model, gap) for gap in GAPS},
            "seconds": time.perf_counter() - began,
            "device": device_name(device),
            "torch": torch.__version__,
        }
        rows.append(row)
        write_results(out, rows)
        said = ", ".join(f"{gap}: {share:.2f}" for gap, share in row["accuracy"].items())
        told = f"{config.model}, {config.learning_rate:g}, seed {config.seed}"
        print(f"{told}: right after a gap of {said}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, "python -m megalodon_enwik8.recall")
    count = whole_number(1)
    parser.add_argument("out", metavar="FILE", help="a .jsonl for the figures; is gone on with")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=count, default=[7, 8, 9], help="(7 8 9)")
    parser.add_argument("--steps", type=count, default=800, help="(%(default)s)")
    parser.add_argument("--sequences", type=count, default=64, help="in a step (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    given = read_overrides(options.settings)
    probe(Path(options.out), options.seeds, options.steps, options.sequences, given)
    return 0


if __name__ == "__main__":
    run_main(main)
