"""A checkpoint as a Hugging Face folder: python -m megalodon_enwik8.export runs/X/final.pt DIR

After `import megalodon`, AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") load
the folder, whichever model it holds; programs that import nothing do with trust_remote_code=True.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from megalodon import MegalodonTokenizer
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.model_card import model_card
from megalodon_enwik8.models import count_parameters, restore_model
from megalodon_enwik8.safety import Parser, UserError, run_main

BYTES = 256
END = 0  # the byte that ends and pads: no text holds it


def export_model(model: PreTrainedModel, card: str, folder: Path) -> None:
    """Write a byte-level model, its tokenizer and its model card to a folder, made if need be. Each
    file is whole or absent. Byte 0 ends and pads what the exported model writes."""
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = END
    model.generation_config.suppress_tokens = list(range(BYTES, model.config.vocab_size)) or None
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as aside:
        try:
            model.save_pretrained(aside, max_shard_size="1TB")
        except SafetensorError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from error
        MegalodonTokenizer().save_pretrained(aside)
        (Path(aside) / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, folder / file.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m megalodon_enwik8.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    if folder.exists() and (held := next(folder.iterdir(), None)):
        raise UserError(f"{folder}: holds {held.name}: name a new or an empty folder")
    checkpoint = load_checkpoint(Path(options.checkpoint))
    ablation = checkpoint.config.ablation
    if ablation != "none":
        raise UserError(
            f"{checkpoint.path}: trained with ablation={ablation}, for which the library "
            "has no model; only whole Megalodons and Llamas are exported"
        )
    model = restore_model(checkpoint)
    export_model(model, model_card(model, checkpoint), folder)
    print(
        f"{folder}: {type(model).__name__} after {checkpoint.step} steps, "
        f"{count_parameters(model):,} parameters"
    )
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
