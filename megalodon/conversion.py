"""Weights to and from the names of the released code (github.com/XuezheMax/megalodon).

    model = MegalodonForCausalLM(MegalodonConfig.mega1_3b())
    model.load_state_dict(from_released(torch.load(path, weights_only=True), model.config))

One table, :data:`MODEL` and :data:`LAYER`, states every name and shape of world size one; beside
them stand the constants of :func:`_constants`. The released rotary embedding turns adjacent pairs
(2i, 2i + 1) of a head. Here the pairs are (i, i + d/2): the same scores once the rows of ``wz``
and the columns of ``gamma`` and ``beta`` are permuted inside each head, on the axes marked ``~``.

A file that differs is refused with every differing name, shape and constant, so that nothing is
ever loaded into the wrong place.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_megalodon import MegalodonConfig


class Entry(NamedTuple):
    """One tensor: our name, the released name, the released shape, the option it depends on.

    The shape is in the symbols of :func:`_sizes`; ``~`` marks the axis of rotary pairs. Ours is
    the same without the axes of length one.
    """

    ours: str
    released: str
    shape: str
    option: str = ""


MODEL = (
    Entry("model.embed_tokens.weight", "embed.weight", "V D"),
    Entry("model.final_norm.weight", "output.final_norm.weight", "D"),
    Entry("model.final_norm.bias", "output.final_norm.bias", "D"),
    Entry("lm_head.weight", "output.output.weight", "V D"),  # stored where tied as well
)

LAYER = (
    Entry("timestep_norm.weight", "mega.timenorm.weight", "D"),
    Entry("timestep_norm.bias", "mega.timenorm.bias", "D"),
    Entry("cema.alpha", "mega.cema.alpha", "D N 1"),
    Entry("cema.delta", "mega.cema.delta", "D N 1"),
    Entry("cema.theta", "mega.cema.theta", "D 1 1"),
    Entry("cema.gamma", "mega.cema.gamma", "D N 2"),
    Entry("cema.omega", "mega.cema.omega", "D 1"),
    Entry("rms_norm.weight", "mega.rmsnorm.weight", "D"),
    Entry("wz.weight", "mega.wz.weight", "~Z D"),
    Entry("wz.bias", "mega.wz.bias", "~Z"),
    Entry("wv.weight", "mega.wv.weight", "E D"),
    Entry("wv.bias", "mega.wv.bias", "E"),
    Entry("wr.weight", "mega.wr.weight", "E D"),
    Entry("wr.bias", "mega.wr.bias", "E"),
    Entry("wh1.weight", "mega.wh1.weight", "D D"),
    Entry("wh1.bias", "mega.wh1.bias", "D"),
    Entry("wh2.weight", "mega.wh2.weight", "D E"),
    Entry("wh2.bias", "mega.wh2.bias", "D", "output_ffn_bias"),
    Entry("query_key.gamma", "mega.gamma", "2 ~Z"),
    Entry("query_key.beta", "mega.beta", "2 ~Z"),
    Entry("ffn_norm.weight", "nffn.norm.weight", "D"),
    Entry("ffn_norm.bias", "nffn.norm.bias", "D"),
    Entry("ffn.w1.weight", "nffn.fc1.weight", "F D"),
    Entry("ffn.w1.bias", "nffn.fc1.bias", "F", "output_ffn_bias"),
    Entry("ffn.w2.weight", "nffn.fc2.weight", "D F"),
    Entry("ffn.w2.bias", "nffn.fc2.bias", "D", "output_ffn_bias"),
    Entry("ffn.w3.weight", "nffn.fc3.weight", "F D", "swiglu"),
    Entry("ffn.w3.bias", "nffn.fc3.bias", "F", "swiglu output_ffn_bias"),
    Entry("ffn.alpha", "nffn.alpha", "D", "rescale_nffn"),
)


def from_released(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """Our state dict from a released one of world size one; dtypes stay as they are.

    A tied model's result holds the shared matrix under both names, as ``model.state_dict()`` does.
    Constants may be left out.

    Raises:
        ValueError: naming every key that is unknown or missing and every shape or constant that is
            wrong.
    """
    entries = _entries(config)
    sizes = _sizes(config)
    constants = _constants(config)
    others = [
        key
        for key, value in constants.items()
        if key in state_dict and not _same(state_dict[key], value)
    ]
    state_dict = {key: value for key, value in state_dict.items() if key not in constants}
    shapes = {entry.released: _shape(entry, sizes) for entry in entries}
    _check(state_dict, shapes, "the released code's", others)
    order = torch.arange(config.z_dim // config.num_heads).view(-1, 2).T.flatten()
    return {
        entry.ours: _reorder(
            state_dict[entry.released].reshape(_our_shape(entry, sizes)), entry, order
        )
        for entry in entries
    }


def to_released(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """The released code's state dict, world size one, from ``model.state_dict()``.

    Raises:
        ValueError: naming every key that is unknown or missing and every shape that is wrong.
    """
    entries = _entries(config)
    sizes = _sizes(config)
    shapes = {entry.ours: _our_shape(entry, sizes) for entry in entries}
    _check(state_dict, shapes, "MegalodonForCausalLM's")
    order = torch.arange(config.z_dim // config.num_heads).view(2, -1).T.flatten()
    tensors = {
        entry.released: _reorder(state_dict[entry.ours], entry, order).reshape(_shape(entry, sizes))
        for entry in entries
    }
    return tensors | _constants(config)


def _constants(config: MegalodonConfig) -> dict[str, Tensor]:
    """What the released code stores beside its parameters: rotary frequencies, and the priors of
    its TimestepNorms, with which this model agrees where they are zero."""
    head_dim = config.z_dim // config.num_heads
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    constants = {"rope.freqs": (config.rope_base**-exponent).float()}
    layers = [f"layers.{i}.mega.timenorm" for i in range(config.num_layers)]
    for norm in (*layers, "output.final_norm"):
        constants[f"{norm}.prior_count"] = torch.zeros((), dtype=torch.int64)
        constants[f"{norm}.prior_mean"] = torch.zeros(config.norm_num_groups)
        constants[f"{norm}.prior_logv"] = torch.zeros(config.norm_num_groups)
    return constants


def _same(found: Tensor, constant: Tensor) -> bool:
    """Whether a constant is as it must be, up to the digits of a bfloat16."""
    found = found.to("cpu", constant.dtype)
    return found.shape == constant.shape and torch.allclose(found, constant, rtol=0.01)


def _entries(config: MegalodonConfig) -> list[Entry]:
    """The tensors of a model of this config, layers numbered."""
    options = {
        "output_ffn_bias": config.output_ffn_bias,
        "swiglu": config.swiglu,
        "rescale_nffn": config.rescale_nffn,
    }
    layers = (
        entry._replace(
            ours=f"model.layers.{i}.{entry.ours}", released=f"layers.{i}.{entry.released}"
        )
        for i in range(config.num_layers)
        for entry in LAYER
    )
    return [
        entry
        for entry in (*MODEL, *layers)
        if all(options[option] for option in entry.option.split())
    ]


def _sizes(config: MegalodonConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.model_dim,
        "N": config.cema_ndim,
        "Z": config.z_dim,
        "E": config.value_dim,
        "F": config.ffn_hidden_dim,
    }


def _shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
    symbols = entry.shape.replace("~", "").split()
    return tuple(sizes[symbol] if symbol in sizes else int(symbol) for symbol in symbols)


def _our_shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return _shape(entry._replace(shape=entry.shape.replace(" 1", "")), sizes)


def _reorder(tensor: Tensor, entry: Entry, order: Tensor) -> Tensor:
    """Apply `order` inside each head, on the axis that the table marks."""
    marked = [i for i, symbol in enumerate(entry.shape.split()) if symbol.startswith("~")]
    if not marked:
        return tensor
    axis = marked[0]
    heads = tensor.unflatten(axis, (-1, order.numel()))
    return heads.index_select(axis + 1, order.to(tensor.device)).flatten(axis, axis + 1)


def _check(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    whose: str,
    other_constants: Sequence[str] = (),
) -> None:
    """Raise one ValueError for all that is wrong."""
    unknown = [key for key in state_dict if key not in shapes]
    missing = [key for key in shapes if key not in state_dict]
    wrong = [
        f"{key} is {found}, must be {wanted}"
        for key, wanted in shapes.items()
        if key in state_dict and (found := tuple(state_dict[key].shape)) != wanted
    ]
    problems = [
        f"{name}: {', '.join(keys)}"
        for name, keys in (
            ("unknown", unknown),
            ("missing", missing),
            ("of another shape", wrong),
            ("constants of another model", other_constants),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the state dict is not {whose}, of world size one and this config; "
            + "; ".join(problems)
        )
