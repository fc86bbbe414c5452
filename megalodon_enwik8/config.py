"""The experiment's settings: one typed, flat schema for the YAML files and the command line.

Every default lives here and nowhere else. Every mistake is a UserError of one line that names
the file, the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from megalodon_enwik8.errors import UserError

MAX_CONFIG_BYTES = 1_000_000

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _numeric_string(value: object) -> object:
    """YAML 1.1 reads `4e-4` (no dot) as a string; people mean the number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _null_is(meaning: float) -> BeforeValidator:
    return BeforeValidator(lambda value: meaning if value is None else value)


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Interval = Annotated[int, Field(ge=0, le=2**31 - 1)]
Real = Annotated[float, BeforeValidator(_numeric_string)]
Probability = Annotated[Real, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(pattern=r"^\P{Cc}+$")]  # a NUL is in no path, ESC rules terminals


def _megalodon(default: Any) -> Any:
    """A key that only the Megalodon has."""
    return Field(default, json_schema_extra={"model": "megalodon"})


def _llama(default: Any) -> Any:
    """A key that only the Llama has."""
    return Field(default, json_schema_extra={"model": "llama"})


class ExperimentConfig(BaseModel):
    """Everything that defines one run. Immutable; unknown keys and loose types are refused.

    Lengths and sizes are in tokens, which are bytes, unless a comment says otherwise. For the
    intervals (`..._every`) 0 means never.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    run_dir: PathText  # load_config: runs/<name of the file>
    model: Literal["megalodon", "llama"] = "llama"

    # Both models
    num_tokens: Annotated[int, Field(ge=256, le=2**20)] = 256  # vocabulary
    rope_base: Annotated[Real, Field(gt=1), _null_is(10_000.0)] = 10_000.0
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
    # The library's, or fan_in: see fan_in.py
    init_mode: Literal["he", "xavier", "bert", "gaussian", "none", "fan_in"] = _megalodon("he")
    hidden_dropout: Probability = _megalodon(0.0)
    dropout: Probability = _megalodon(0.0)
    ablation: Literal["none", "no_cema", "layer_norm"] = _megalodon("none")  # see ablations.py

    # Llama
    dim: Width = _llama(384)
    depth: Layers = _llama(6)
    heads: Width = _llama(6)
    dim_head: Width = _llama(64)
    tied_embedding: bool = _llama(True)
    # The FFN's width: this times dim, or int(8 dim / 3), rounded up to a multiple of 256
    ffn_dim_multiplier: Annotated[Real, Field(gt=0, le=1000)] | None = _llama(None)
    flash_attn: bool = _llama(True)  # PyTorch's fused attention; false: the written-out one
    llama_init: Literal["transformers", "pytorch", "fan_in"] = _llama("transformers")

    # Data
    data_path: PathText = "data/enwik8.gz"  # or `sample`, or any file
    data_bytes: Count | None = None  # read so many bytes; null: 95,000,000 of enwik8, else all
    seq_len: Count = 512
    carry_state: bool = _megalodon(False)  # the sequences of a step go on where the last ended
    carry_steps: Count | None = _megalodon(None)  # and begin anew after so many; null: at the end

    # Optimisation
    num_batches: Count = 1200  # training steps
    batch_size: Count = 1  # sequences in a micro-batch
    grad_accum_every: Count = 16  # micro-batches in a step; how they split changes no result
    optimizer: Literal["adam", "adamw"] = "adam"  # adamw: its decay is decoupled, of matrices alone
    beta2: Annotated[Real, Field(gt=0, lt=1)] = 0.999
    learning_rate: Annotated[Real, Field(gt=0)] = 4e-4  # its highest, where it changes
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: Annotated[Real, Field(ge=0)] = 0.0  # where the cosine ends
    warmup_steps: Interval = 0  # steps in which the learning rate rises linearly
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[Real, Field(gt=0)] = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient of nan or inf does
    # null, or -1: one is drawn, said and stored
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1), _null_is(-1)] = 7

    # Execution
    use_autocast: bool = True  # bfloat16
    compile: Literal[True, False, "auto"] = "auto"
    gradient_checkpointing: bool = False

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
    temperature: Annotated[Real, Field(ge=0)] = 1.0  # 0: the likeliest byte each time
    min_p: Annotated[Real, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _check_combinations(self) -> ExperimentConfig:
        for name in sorted(self.model_fields_set):
            owner = model_of_key(name)
            if owner not in (None, self.model):
                raise ValueError(
                    f"{name}={_show(getattr(self, name))}: is a key of model: {owner}, but this is "
                    f"model: {self.model}; remove the key or change the model"
                )
        if self.model == "megalodon":
            self._check_multiple("model_dim", "norm_num_groups")
            self._check_multiple("z_dim", "num_heads")
            self._check_multiple("value_dim", "num_heads")
            if self.carry_steps is not None and not self.carry_state:
                raise ValueError(
                    f"carry_steps={self.carry_steps}: only a run with carry_state: true carries a "
                    f"state from step to step; set that, or remove carry_steps"
                )
            if self.z_dim // self.num_heads % 2:
                raise ValueError(
                    f"z_dim={self.z_dim}: z_dim / num_heads must be even, since RoPE rotates "
                    f"pairs; try {2 * self.num_heads * (self.z_dim // (2 * self.num_heads) + 1)}"
                )
        else:
            self._check_multiple("dim", "heads")
            if self.dim_head % 2:
                raise ValueError(
                    f"dim_head={self.dim_head}: must be even, since RoPE rotates pairs; "
                    f"try {self.dim_head + 1}"
                )
        if self.min_lr and not (self.schedule == "cosine" and self.min_lr <= self.learning_rate):
            raise ValueError(
                f"min_lr={self.min_lr}: is where schedule: cosine ends, and at most "
                f"learning_rate={self.learning_rate}; here the schedule is {self.schedule}"
            )
        if self.warmup_steps > self.num_batches:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}: must be at most "
                f"num_batches={self.num_batches}, all steps of the run"
            )
        return self

    def _check_multiple(self, name: str, divisor_name: str) -> None:
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if value % divisor:
            raise ValueError(
                f"{name}={value}: must be a multiple of {divisor_name}={divisor}; "
                f"try {divisor * max(1, round(value / divisor))}"
            )

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
            if model_of_key(name) in (None, self.model)
        }

    def to_yaml(self) -> str:
        """The file that `load_config` reads back to an equal config."""
        return yaml.safe_dump(self.used(), sort_keys=False)


def model_of_key(name: str) -> str | None:
    """The model that alone has the key `name`, or None for a key of both."""
    extra = ExperimentConfig.model_fields[name].json_schema_extra
    return str(extra["model"]) if isinstance(extra, dict) else None


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
) -> ExperimentConfig:
    """Read a YAML file and apply `key=value` overrides, their values read as YAML scalars.

    Raises UserError for a file that is missing, is not YAML or not a mapping, for a repeated
    or unknown key, and for a value of the wrong type or range.
    """
    values = read_yaml(path)
    source = dict.fromkeys(values, str(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(
                f"command line: {override!r}: expected key=value, as in num_batches=100"
            )
        values[name] = _parse_yaml(text, f"command line: {_show(name)}")
        source[name] = "command line"
    values.setdefault("run_dir", f"runs/{Path(path).stem}")
    return make_config(values, str(path), source)


def make_config(
    values: Mapping[str, Any], where: str, source: Mapping[str, str] | None = None
) -> ExperimentConfig:
    """Validate `values`; a UserError names `source[key]`, or else `where`, as the place."""
    source = source or {}
    for name in values:
        if name not in ExperimentConfig.model_fields:
            near = difflib.get_close_matches(str(name), ExperimentConfig.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "see megalodon_enwik8/config.py"
            raise UserError(f"{source.get(name, where)}: {_show(name)}: unknown key; {hint}")
    try:
        return ExperimentConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of _check_combinations, which names key and value
            message = str(first["ctx"]["error"])
            key = message.partition("=")[0]
        else:
            key = str(first["loc"][0])
            message = f"{key}={_show(values.get(key))}: {_remedy(key, first)}"
        raise UserError(f"{source.get(key, where)}: {message}") from None


def _remedy(key: str, error: Mapping[str, Any]) -> str:
    """What would have been right, from one of pydantic's errors."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind == "bool_type":
        text = "must be true or false"
    elif kind == "int_type":
        text = "must be a whole number"
    elif kind == "float_type":
        text = "must be a number"
    elif kind == "finite_number":
        text = "must be a finite number"
    elif kind == "string_type" or (kind == "string_pattern_mismatch" and not error["input"]):
        text = "must be a text (in quotes if it looks like something else)"
    elif kind in ("string_pattern_mismatch", "string_unicode"):
        text = "must be a path without control characters"
    elif kind == "literal_error":
        text = "must be " + context["expected"].replace("True", "true").replace("False", "false")
        near = difflib.get_close_matches(
            str(error["input"]), re.findall(r"'(\w+)'", context["expected"]), n=1
        )
        text += f"; did you mean {near[0]}?" if near else ""
    else:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        bounds = [f"{signs[name]} {bound}" for name, bound in context.items() if name in signs]
        text = f"must be {bounds[0]}" if bounds else str(error["msg"])
    if kind.endswith("_type") and type(None) in getattr(
        ExperimentConfig.model_fields[key].annotation, "__args__", ()
    ):
        text += " or null"
    if key == "use_autocast":
        text += "; autocast is to bfloat16, float16 overflows and is not served"
    return text


def _show(value: object) -> str:
    """A value as YAML would have it, in at most 60 characters (aliases can nest without end)."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    if not isinstance(value, (str, int, float)):
        return f"a {type(value).__name__}"
    text = str(value)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, of which YAML would silently keep the last, and
    aliases, which let a short file grow without bound and have no use in a flat one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                problem=f"*{event.anchor} is an alias; write the value itself",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node.value, str) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"{where}: {line}{error.problem or 'not valid YAML'}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; a config is flat") from None
    except (LookupError, TypeError, AttributeError):
        # What PyYAML's constructors meet such a value with.
        raise UserError(f"{where}: not valid YAML: a value does not fit its tag") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error).partition("\n")[0]
        raise UserError(f"{where}: not valid YAML: {reason}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; the shipped ones lie in configs/") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a YAML file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; not a config file")
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not a {type(values).__name__}")
    return values
