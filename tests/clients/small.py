"""What the scripts of this folder share: a small export of either model, and rows of findings."""

import os
import sys
from pathlib import Path

# Nothing is looked up on the hub, and transformers is not asked about it.
os.environ |= {"HF_HUB_OFFLINE": "1", "FORCE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

ROOT = Path(__file__).resolve().parents[2]

SIZES = {
    "llama": {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16},
    "megalodon": {"model_dim": 32, "num_layers": 2, "num_heads": 2, "z_dim": 16, "value_dim": 32}
    | {"ffn_hidden_dim": 64, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4},
}


def export(model, folder):
    """Train `model` for some steps on the README and export it, as a user does: two commands."""
    from megalodon_enwik8.config import ExperimentConfig
    from megalodon_enwik8.export import main
    from megalodon_enwik8.training import train

    config = ExperimentConfig(
        model=model,
        run_dir=str(folder / model),
        data_path=str(ROOT / "README.md"),
        seq_len=64,
        num_batches=30,
        batch_size=4,
        learning_rate=1e-2,
        use_autocast=False,
        compile=False,
        validate_every=0,
        save_every=0,
        generate_every=0,
        **SIZES[model],
    )
    target = folder / f"{model}-exported"
    train(config)
    main([str(folder / model / "final.pt"), str(target)])
    return target


class Findings:
    """One line a row on stdout, where from now on nothing else is printed; `exit` tells whether
    all of them held."""

    def __init__(self):
        self.failed = 0
        self.out, sys.stdout = sys.stdout, sys.stderr

    def row(self, holds, what):
        self.failed += not holds
        print("ok    " if holds else "FAILED", what, file=self.out, flush=True)

    def exit(self):
        sys.exit(1 if self.failed else 0)
