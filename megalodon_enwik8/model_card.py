"""The README.md of an exported model: only what its checkpoint and its run folder say."""

from __future__ import annotations

import contextlib

from transformers import PreTrainedModel

from megalodon_enwik8.checkpoint import Checkpoint
from megalodon_enwik8.config import load_config
from megalodon_enwik8.data import CODE, ENWIK8, SAMPLE, named_text
from megalodon_enwik8.models import count_parameters
from megalodon_enwik8.run_folder import Row, read_metrics
from megalodon_enwik8.safety import UserError

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
    with contextlib.suppress(OSError, UserError):
        if load_config(checkpoint.path.with_name("config.yaml")) == checkpoint.config:
            rows = read_metrics(checkpoint.path.with_name("metrics.jsonl"))
            return next((row for row in rows if row["step"] == checkpoint.step), {})
    return {}
