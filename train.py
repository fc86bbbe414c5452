"""Train a model: python train.py --config configs/quickstart.yaml [key=value ...]"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megalodon_enwik8.safety import Parser, run_main


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or from the newest valid one of the run folder",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start over; the old run folder is renamed"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces the config's value"
    )
    options = parser.parse_intermixed_args(argv)
    if options.resume and "=" in options.resume and not options.resume.endswith(".pt"):
        # `--resume key=value`: the optional path swallowed an override.
        options.overrides.insert(0, options.resume)
        options.resume = "newest"
    if options.overwrite and options.resume is not None:
        parser.error("--resume goes on with a run, --overwrite starts over: give one of them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # Imported after the command line is known to be good: torch takes seconds to load.
    from megalodon_enwik8.config import load_config

    config = load_config(options.config, options.overrides)

    from megalodon_enwik8.training import train

    return train(config, resume=options.resume, overwrite=options.overwrite)


OUT_OF_MEMORY = "lower batch_size and raise grad_accum_every, or set gradient_checkpointing: true"

if __name__ == "__main__":
    run_main(main, OUT_OF_MEMORY)
