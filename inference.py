"""Continue a text: python inference.py runs/X/final.pt [--prompt "Once upon a time"]"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megalodon_enwik8.safety import Parser, UserError, number, run_main, whole_number

MAX_PROMPT_BYTES = 1 << 26

# A fact stands early, and chunks of 256 bytes lie between it and what is written: a model that
# uses what it read before its current chunk can take it up again.
DEFAULT_PROMPT = (
    b"Notes from the survey of Port Elsinra, in the order in which they were made. Remember this: "
    b"the code of the north gate is KOBALT-7316, and the boat leaves at six. The market sells "
    b"dried figs, lamp oil and maps of the delta. Two cranes stand idle beside the old customs "
    b"house, and a tram runs along the quay every hour. The keeper asked for the code of the north "
    b"gate, which is "
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", help="the text to continue; by default what is piped in, else a text of its own"
    )
    source.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    source.add_argument("--prompt-gzip", metavar="FILE", help="a gzipped file; its first bytes")
    parser.add_argument(
        "--prompt-len",
        type=whole_number(1),
        metavar="N",
        help="how many bytes of --prompt-gzip (384)",
    )
    parser.add_argument(
        "--max-length",
        type=whole_number(1),
        default=512,
        metavar="N",
        help="new bytes to make (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=1.0,
        metavar="T",
        help="0 takes the likeliest byte each time (%(default)s)",
    )
    parser.add_argument(
        "--min-p",
        type=number(0, 1),
        default=0.1,
        metavar="P",
        help="leave out bytes less likely than P times the likeliest (%(default)s)",
    )
    parser.add_argument(
        "--top-k", type=whole_number(1), metavar="K", help="leave out all but the K likeliest"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=7, metavar="N", help="(%(default)s)"
    )
    options = parser.parse_args(argv)
    if options.prompt_len is not None and options.prompt_gzip is None:
        parser.error("--prompt-len says how much of --prompt-gzip is read: give both")
    return options


def read_prompt(options: argparse.Namespace) -> bytes:
    """The prompt's bytes, from an option, a file, stdin or, where that has none, DEFAULT_PROMPT; a
    UserError if the place holds none."""
    if options.prompt is not None:
        prompt, source = os.fsencode(options.prompt), "--prompt"
    elif options.prompt_file is not None or options.prompt_gzip is not None:
        zipped = options.prompt_gzip is not None
        source = options.prompt_gzip if zipped else options.prompt_file
        count = (options.prompt_len or 384) if zipped else MAX_PROMPT_BYTES + 1
        try:
            with (gzip.open if zipped else open)(source, "rb") as file:
                prompt = file.read(count)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{source}: cannot be read: {error}") from None
    elif sys.stdin is None or sys.stdin.isatty():
        return DEFAULT_PROMPT
    else:
        prompt, source = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1) or DEFAULT_PROMPT, "stdin"
    if not prompt:
        raise UserError(f"the prompt from {source} is empty: give at least one byte to continue")
    if len(prompt) > MAX_PROMPT_BYTES:
        raise UserError(f"the prompt from {source} is longer than {MAX_PROMPT_BYTES} bytes")
    return prompt


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    prompt = read_prompt(options)
    # Imported after the command line is known to be good: torch takes seconds to load.
    from megalodon_enwik8.checkpoint import load_checkpoint
    from megalodon_enwik8.device import choose_device
    from megalodon_enwik8.generation import ByteStreamer, generate_bytes
    from megalodon_enwik8.models import restore_model

    model = restore_model(load_checkpoint(Path(options.checkpoint)), choose_device())

    write = partial(print, end="", flush=True)
    began = time.perf_counter()
    generate_bytes(
        model,
        prompt,
        length=options.max_length,
        seed=options.seed,
        temperature=options.temperature,
        min_p=options.min_p,
        top_k=options.top_k,
        streamer=ByteStreamer(write),
    )
    seconds = time.perf_counter() - began
    print()
    print(
        f"{options.max_length} bytes after a prompt of {len(prompt)} in {seconds:.1f} s: "
        f"{options.max_length / seconds:.1f} tokens per second",
        file=sys.stderr,
    )
    return 0


OUT_OF_MEMORY = "give a shorter prompt, or lower --max-length"

if __name__ == "__main__":
    run_main(main, OUT_OF_MEMORY)
