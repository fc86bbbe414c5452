"""Benchmarks of both models, side by side: python -m megalodon_enwik8.benchmark train|context"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megalodon_enwik8 import benchmark_context
from megalodon_enwik8.command_line import Parser, whole_number
from megalodon_enwik8.errors import run_main


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m megalodon_enwik8.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="training steps: time, memory, compilation")
    train.add_argument(
        "--micro-batches",
        type=whole_number(1),
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="sequences at a time; each must divide 16",
    )
    train.add_argument("--steps", type=whole_number(1), default=7, help="timed steps of each")
    train.add_argument(
        "--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"]
    )
    train.add_argument("--seq-len", type=whole_number(1), default=512)
    train.add_argument("--out", default="runs/benchmark", metavar="DIR", help="for train.json, .md")
    train.add_argument(
        "--profile",
        action="store_true",
        help="show where one Megalodon step's time goes, and nothing else",
    )
    # What a fresh process is asked to measure, by the process that the user started.
    train.add_argument("--probe", help=argparse.SUPPRESS)
    benchmark_context.add_parser(commands)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.command == "context":
        return benchmark_context.run(options)
    # Imported after the command line is known to be good: torch takes seconds to load.
    from megalodon_enwik8 import benchmark_train

    return benchmark_train.run(options)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
