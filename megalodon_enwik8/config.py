"""The experiment's settings: one typed, flat schema for the YAML files and the command line.

Every default of a run lives here and nowhere else. Every mistake is a UserError of one line that
names the file, the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from megalodon_enwik8.safety import UserError


def _null_is(meaning: float) -> BeforeValidator:
    return BeforeValidator(lambda value: meaning if value is None else value)


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Interval = Annotated[int, Field(ge=0, le=2**31 - 1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(pattern=r"^\P{Cc}+$")]  # a NUL is in no path, ESC rules terminals

MODELS = ("megalodon", "llama")  # in the order of tables

# Changes to a Megalodon, for comparison: see models.ablate.
ABLATIONS = ("no_cema", "layer_norm", "one_hop", "sharp_scores")

# Keys that only one of the models has.
_megalodon = partial(Field, json_schema_extra={"model": "megalodon"})
_llama = partial(Field, json_schema_extra={"model": "llama"})

# Keys that leave the course of the weights alone: a resumed run may change them, and runs that
# differ in nothing else are of one group. Which text it is is told by name and checksum, and how
# the sequences of a step are split by their product.
FREE_KEYS = frozenset(
    {
        "run_dir", "data_path", "data_bytes", "batch_size", "grad_accum_every", "compile",
        "gradient_checkpointing", "on_nonfinite", "validate_every", "full_validation", "save_every",
        "keep_last", "keep_best", "generate_every", "generate_prompt_len", "generate_length",
        "temperature", "min_p", "shard", "chunk_parallel", "tracker",
    }
)  # fmt: skip


class ExperimentConfig(BaseModel):
    """Everything that defines one run. Immutable; unknown keys and loose types are refused.

    Lengths and sizes are in tokens, which are bytes, unless a comment says otherwise. For the
    intervals (`..._every`) 0 means never, but that a run ends with a validation and a checkpoint.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    # load_config: runs/<name of the file>, or where a run's own config.yaml lies
    run_dir: Annotated[PathText, AfterValidator(os.path.expanduser)]
    model: Literal["megalodon", "llama"] = "llama"

    # Both models
    num_tokens: Annotated[int, Field(ge=256, le=2**20)] = 256  # vocabulary
    rope_base: Annotated[float, Field(gt=1), _null_is(10_000.0)] = 10_000.0
    attention_dropout: Probability = 0.0

    # Megalodon: the symbols of the paper stand behind the keys
    model_dim: Width = _megalodon(384)  # D
    num_layers: Layers = _megalodon(6)
    num_heads: Width = _megalodon(3)  # H
    z_dim: Width = _megalodon(192)  # Z
    value_dim: Width = _megalodon(384)  # E
    ffn_hidden_dim: Width = _megalodon(1024)  # F
    cema_ndim: Width = _megalodon(8)  # N
    chunk_size: Count = _megalodon(256)  # C
    norm_num_groups: Width = _megalodon(32)  # G
    swiglu: bool = _megalodon(True)
    rescale_nffn: bool = _megalodon(False)
    scale_emb: bool = _megalodon(False)
    share_emb: bool = _megalodon(True)
    output_ffn_bias: bool = _megalodon(True)  # on W_h2 and the three matrices of the FFN
    # The library's, or fan_in: see models.draw_by_fan_in
    init_mode: Literal["he", "xavier", "bert", "gaussian", "none", "fan_in"] = _megalodon("he")
    hidden_dropout: Probability = _megalodon(0.0)
    dropout: Probability = _megalodon(0.0)
    ablation: str = _megalodon("none")  # of ABLATIONS, in that order, joined by +

    # Llama
    dim: Width = _llama(384)
    depth: Layers = _llama(6)
    heads: Width = _llama(6)
    dim_head: Annotated[Width, Field(multiple_of=2)] = _llama(64)  # RoPE rotates pairs
    tied_embedding: bool = _llama(True)
    # The FFN's width: this times dim, or int(8 dim / 3), rounded up to a multiple of 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=1000)] | None = _llama(None)
    flash_attn: bool = _llama(True)  # PyTorch's fused attention; false: the written-out one
    llama_init: Literal["transformers", "pytorch", "fan_in"] = _llama("transformers")
    two_hop: bool = _llama(False)  # a Megalodon's residual, for comparison: see models.TwoHopLayer

    # Data
    data_path: PathText = "data/enwik8.gz"  # or `sample`, `code`, or any file
    data_bytes: Count | None = None  # read so many bytes; null: 95,000,000 of enwik8, else all
    seq_len: Count = 512

    # Optimisation
    num_batches: Count = 1200  # training steps
    batch_size: Count = 1  # sequences in a micro-batch
    grad_accum_every: Count = 16  # micro-batches in a step; how they split changes no result
    optimizer: Literal["adam", "adamw"] = "adam"  # adamw: its decay is decoupled, of matrices alone
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4  # its highest, where it changes
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # where the cosine ends
    warmup_steps: Interval = 0  # steps in which the learning rate rises linearly
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(gt=0)] = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient of nan or inf does
    # null, or -1: one is drawn, said and stored
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1), _null_is(-1)] = 7

    # Execution
    # bfloat16; auto: where the device has instructions for it, and float32 elsewhere
    use_autocast: Literal[True, False, "auto"] = True
    compile: Literal[True, False, "auto", "graphs"] = "auto"  # graphs: as CUDA graphs
    gradient_checkpointing: bool = False
    shard: bool = False  # torchrun: weights, gradients and moments are spread over the processes
    chunk_parallel: Count = 1  # torchrun: so many processes share each sequence along time

    # Intervals, in steps
    validate_every: Interval = 100
    val_batches: Count = 10  # fixed windows of seq_len, whatever the batch size is
    # search: the windows midway between those, to choose settings by what no table reports
    val_windows: Literal["report", "search"] = "report"
    full_validation: bool = True  # one pass over the whole validation split at the end
    save_every: Interval = 100
    keep_last: Count | None = None  # checkpoints to keep; null: all
    keep_best: bool = False  # best.pt: the weights with the lowest validation loss
    generate_every: Interval = 500
    generate_prompt_len: Count = 128
    generate_length: Count = 512  # new bytes after the prompt
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: the likeliest byte each time
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.1

    # tensorboard: writes what metrics.jsonl says for `tensorboard --logdir runs` too
    tracker: Literal["none", "tensorboard"] = "none"

    @model_validator(mode="after")
    def _check_combinations(self) -> ExperimentConfig:
        for name in sorted(self.model_fields_set):
            owner = model_of_key(name)
            if owner not in (None, self.model):
                raise ValueError(
                    f"{name}={getattr(self, name)}: is a key of model: {owner}, but this is "
                    f"model: {self.model}; remove the key or change the model"
                )
        wanted = self.ablation.split("+")
        if self.ablation != "none" and wanted != [name for name in ABLATIONS if name in wanted]:
            raise ValueError(
                f"ablation={self.ablation[:60]}: must be none, or one of "
                f"{', '.join(ABLATIONS)}, or several of them in this order, joined by +"
            )
        parts = self.chunk_parallel
        if parts > 1 and (self.model == "llama" or self.seq_len % (parts * self.chunk_size)):
            raise ValueError(
                f"chunk_parallel={parts}: seq_len={self.seq_len} must be that many parts of whole "
                f"chunks of chunk_size={self.chunk_size}, and the model a Megalodon; a Llama "
                "attends to a whole sequence, and has shard"
            )
        if self.compile == "graphs" and not self.is_replayable:
            raise ValueError(
                "compile=graphs: replays what ran before, one micro-batch a step: set "
                "grad_accum_every: 1 and gradient_checkpointing: false, or compile: true"
            )
        if self.min_lr and not (self.schedule == "cosine" and self.min_lr <= self.learning_rate):
            raise ValueError(
                f"min_lr={self.min_lr}: is where schedule: cosine ends, and at most "
                f"learning_rate={self.learning_rate}; here the schedule is {self.schedule}"
            )
        return self

    @property
    def is_replayable(self) -> bool:
        """Whether CUDA graphs can serve a step: a second backward would write over the first."""
        return self.grad_accum_every == 1 and not self.gradient_checkpointing

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accum_every

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0 .. num_batches - 1: a linear rise over `warmup_steps`, then
        constant, or half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983) to `min_lr`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / (self.num_batches - self.warmup_steps)
        falling = (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + falling

    def used(self) -> dict[str, Any]:
        """The keys that this run's model reads, with their values, in the order of the schema."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if has_key(self.model, name)
        }

    def to_yaml(self) -> str:
        """The file that `load_config` reads back to an equal config."""
        return yaml.safe_dump(self.used(), sort_keys=False)


def bits_per_byte(loss: float) -> float:
    """Nats per byte to bits per byte (called BPC, bits per character, on enwik8)."""
    return loss / math.log(2)


def model_of_key(name: str) -> str | None:
    """The model that alone has the key `name`, or None for a key of both."""
    extra = ExperimentConfig.model_fields[name].json_schema_extra
    return str(extra["model"]) if isinstance(extra, dict) else None


def has_key(model: str, name: str) -> bool:
    """Whether a model's config may have it; what is no key of any is for make_config to refuse."""
    return name not in ExperimentConfig.model_fields or model_of_key(name) in (None, model)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file and apply `key=value` overrides, their values read as YAML scalars. The
    config.yaml of a run is of the folder that it is in, wherever that was moved to.

    Raises UserError for a file that is not YAML or not a mapping, for a repeated or unknown key,
    and for a value of the wrong type or range.
    """
    values = {"run_dir": f"runs/{Path(path).stem}", **read_yaml(path)}
    here = Path(path).absolute().parent
    own = Path(path).name == "config.yaml" and (here / "metrics.jsonl").exists()
    if own and Path(str(values["run_dir"])).expanduser().absolute() != here:
        values["run_dir"] = str(here)
    values |= read_overrides(overrides)
    return make_config(values, f"{path} and command line" if overrides else str(path))


def read_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value`, read as YAML."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"command line: {text!r}: expected key=value, as in num_batches=100")
        if name in values:
            raise UserError(f"command line: {name} is given twice")
        if value[:1] not in ("'", '"') and re.search(r"(^|\s)#", value):
            raise UserError(f"command line: {text!r}: # begins a comment: put the value in quotes")
        values[name] = _parse_yaml(value, f"command line: {name!r}")
    return values


def make_config(values: Mapping[str, Any], where: str) -> ExperimentConfig:
    """Validate `values`; a UserError names `where` as the place."""
    for name in values:
        if name not in ExperimentConfig.model_fields:
            near = difflib.get_close_matches(str(name), ExperimentConfig.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "see megalodon_enwik8/config.py"
            raise UserError(f"{where}: {name}: unknown key; {hint}")
    try:
        return ExperimentConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"]:
            key = str(first["loc"][0])
            shown = str(values.get(key))
            message = f"{key}={shown if len(shown) < 60 else shown[:57] + '...'}: {first['msg']}"
        else:  # of _check_combinations, which names key and value
            message = str(first["ctx"]["error"])
        raise UserError(f"{where}: {message}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `4e-4` and `4.0e4` as strings; people mean the numbers.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors meet odd values with errors of many kinds
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", error)
        raise UserError(f"{where}: {line}not valid YAML: {reason}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError if it holds none."""
    values = _parse_yaml(Path(path).read_bytes(), str(path))
    if not isinstance(values, (dict, type(None))):
        raise UserError(f"{path}: must hold `key: value` lines, not a {type(values).__name__}")
    return values or {}
