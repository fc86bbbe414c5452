"""A checkpoint as a Hugging Face folder: python -m megalodon_enwik8.export runs/X/final.pt DIR

After `import megalodon`, AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") load
the folder, whichever model it holds; programs that import nothing do with trust_remote_code=True.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from megalodon import MegalodonTokenizer
from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint
from megalodon_enwik8.config import make_config, read_yaml
from megalodon_enwik8.data import CODE, ENWIK8, SAMPLE, named_text
from megalodon_enwik8.models import count_parameters, restore_model
from megalodon_enwik8.run_folder import Row, read_metrics
from megalodon_enwik8.safety import Parser, UserError, run_main

BYTES = 256
END = 0  # the byte that ends and pads: no text holds it

TEXTS = {
    ENWIK8: ("an XML dump of the English Wikipedia", "CC BY-SA and GFDL"),
    SAMPLE: ("an excerpt of an XML dump of the English Wikipedia", "CC BY-SA and GFDL"),
    CODE: ("Python sources of torch and transformers", "BSD-3-Clause and Apache-2.0"),
}
MEASURED = {
    "val_bpc": "some windows that are spread over the validation split",
    "full_val_bpc": "all of the validation split",
}
UNKNOWN = ("a file", "not known to the program that wrote this: state it before you publish")

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title} that reads and writes bytes

A `{kind}` of {parameters:,} parameters. A token is a byte; byte 0 ends a text and pads it.

- **Trained on** `{text}`, {description}: {steps:,} steps, {sequences} sequences of {length} bytes
  each. SHA-256 of the text, nine tenths of which are for training and the rest for validation:
  `{sha256}`.
- **Licence of the text**: {licence}.
- **BPC**, bits per byte, in windows of {length} bytes: {measured}.

## Load it

With the library of megalodon-enwik8 installed (in a clone of it: `pip install .`):

```python
import megalodon  # makes its classes known to transformers
from transformers import pipeline

generate = pipeline("text-generation", "DIR")  # this folder
print(generate("The history of ", max_new_tokens=200, min_p=0.1)[0]["generated_text"])
```

Programs that import nothing load it with `trust_remote_code=True`: the files that this runs
import the same library.
"""


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


def model_card(model: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """The model card of a model and the checkpoint that it was made of."""
    config, row = checkpoint.config, find_row(checkpoint)
    measured = [f"{row[name]:.4f} on {where}" for name, where in MEASURED.items() if name in row]
    text = named_text(config.data_path)
    description, licence = TEXTS.get(text, UNKNOWN)
    return CARD.format(
        tags=f"{config.model}, byte-level",
        title=f"A {config.model.capitalize()}",
        kind=type(model).__name__,
        parameters=count_parameters(model),
        text=text,
        description=description,
        steps=checkpoint.step,
        sequences=config.sequences_per_step,
        length=config.seq_len,
        sha256=checkpoint.corpus_sha256,
        licence=licence,
        measured=", ".join(measured) or "not known, since no run folder told of it",
    )


def find_row(checkpoint: Checkpoint) -> Row:
    """What the run's metrics.jsonl says of the weights of a checkpoint; empty where it does not lie
    in its own run's folder."""
    own = checkpoint.path.with_name("config.yaml")
    with contextlib.suppress(OSError, UserError):
        values = read_yaml(own) | {"run_dir": checkpoint.config.run_dir}  # before it was moved
        if make_config(values, str(own)) == checkpoint.config:
            rows = read_metrics(checkpoint.path.with_name("metrics.jsonl"))
            return next((row for row in rows if row["step"] == checkpoint.step), {})
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m megalodon_enwik8.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    if folder.exists() and (held := next(folder.iterdir(), None)):
        raise UserError(f"{folder}: holds {held.name}: name a new or an empty folder")
    checkpoint = load_checkpoint(Path(options.checkpoint))
    config = checkpoint.config
    if config.ablation != "none" or config.two_hop:
        changed = "two_hop=True" if config.two_hop else f"ablation={config.ablation}"
        raise UserError(
            f"{checkpoint.path}: trained with {changed}, for which no library "
            "has a model; only whole Megalodons and Llamas are exported"
        )
    model = restore_model(checkpoint)
    export_model(model, model_card(model, checkpoint), folder)
    print(
        f"{folder}: {type(model).__name__} after {checkpoint.step} steps, "
        f"{count_parameters(model):,} parameters"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
