"""A checkpoint as a Hugging Face folder: python -m megalodon_enwik8.export runs/X/final.pt DIR

After `import megalodon`, AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") load
the folder, whichever model it holds; programs that import nothing do with trust_remote_code=True.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_enwik8.safety import LEFTOVER_SUFFIX, Parser, UserError, run_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = 256
END = 0  # the byte that ends and pads: no text holds it

# What an export consists of (a Llama's has no modeling file). A folder with other files is
# somebody's.
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_megalodon.py",
    "tokenization_megalodon.py",
    "tokenizer_config.json",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m megalodon_enwik8.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    parser.add_argument("folder", metavar="DIR", help="made if it is not there")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into DIR even if it holds something else than an earlier export",
    )
    return parser.parse_args(argv)


def export_model(
    model: PreTrainedModel, card: str, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a byte-level model, its tokenizer and its model card to a folder. Each file is whole or
    absent; files of other names stay where they are. Byte 0 ends and pads what the exported model
    writes. Raises UserError if the folder holds anything else than an earlier export and
    `overwrite` is false."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    from megalodon import MegalodonTokenizer

    target = Path(folder)
    check_folder(target, overwrite)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = END
    model.generation_config.suppress_tokens = list(range(BYTES, model.config.vocab_size)) or None
    logging.disable_progress_bar()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=LEFTOVER_SUFFIX, dir=target) as aside:
        try:
            model.save_pretrained(aside, max_shard_size="1TB")
        except SafetensorError as error:
            raise UserError(f"{target}: cannot be written: {error}") from error
        MegalodonTokenizer().save_pretrained(aside)
        (Path(aside) / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, target / file.name)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder may be written to."""
    if folder.is_dir():
        # without what a killed export left
        names = {path.name for path in folder.iterdir() if path.suffix != LEFTOVER_SUFFIX}
        # A README.md alone is somebody's too.
        others = sorted(names - FILES if "config.json" in names else names)
        if others and not overwrite:
            raise UserError(
                f"{folder}: holds {others[0]}{' and more' if others[1:] else ''}, which is no "
                "part of an export: name another folder, or add --overwrite to write into this one"
            )
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is a file: name a folder")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    target = Path(options.folder)
    check_folder(target, options.overwrite)  # before torch takes seconds to load

    from megalodon_enwik8.checkpoint import load_checkpoint
    from megalodon_enwik8.model_card import model_card
    from megalodon_enwik8.models import count_parameters, restore_model

    path = Path(options.checkpoint)
    checkpoint = load_checkpoint(path)
    ablation = checkpoint.experiment(path).ablation
    if ablation != "none":
        raise UserError(
            f"{path}: trained with ablation={ablation}, for which the library has no model; only "
            "whole Megalodons and Llamas are exported"
        )
    model = restore_model(checkpoint, path)
    card = model_card(model, checkpoint, path)
    export_model(model, card, target, overwrite=options.overwrite)
    print(
        f"{target}: {type(model).__name__} after {checkpoint.step} steps, "
        f"{count_parameters(model):,} parameters"
    )
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
