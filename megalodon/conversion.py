"""Weights to and from the names of the released code (github.com/XuezheMax/megalodon).

    model = MegalodonForCausalLM(MegalodonConfig.mega1_3b())
    model.load_state_dict(from_released(torch.load(path, weights_only=True), model.config))

One table, :data:`MODULES`, has the names of modules; those of parameters are the same. Shapes are
the model's own, but for the axes in :data:`ONES`. The released rotary embedding turns adjacent
pairs (2i, 2i + 1) of a head. Here the pairs are (i, i + d/2): the same scores once the axes in
:data:`PAIRS` are permuted inside each head. The constants of :func:`_constants` stand beside.

A file that differs is refused with every differing name, shape and constant, so that nothing is
ever loaded into the wrong place.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_megalodon import MegalodonConfig
from .modeling_megalodon import MegalodonForCausalLM

MODULES = {
    "model.embed_tokens": "embed",
    "model.final_norm": "output.final_norm",
    "lm_head": "output.output",  # stored where tied as well
    "timestep_norm": "mega.timenorm",
    "rms_norm": "mega.rmsnorm",
    "query_key": "mega",
    "ffn_norm": "nffn.norm",
    "ffn.w1": "nffn.fc1",
    "ffn.w2": "nffn.fc2",
    "ffn.w3": "nffn.fc3",
    "ffn": "nffn",
}
"""Our name and the released one; of a layer's modules, inside the layer, where those that are not
here keep their names behind ``mega.``"""

PAIRS = {"wz": 0, "query_key": 1}
"""The axis of rotary pairs, in all parameters of a module."""

ONES = {"cema.alpha": 1, "cema.delta": 1, "cema.theta": 2, "cema.omega": 1}
"""How many axes of length one a released parameter has at its end, and ours has not."""


class Entry(NamedTuple):
    """One tensor: names and shapes here and in the released code, and the axis of rotary pairs."""

    ours: str
    shape: tuple[int, ...]
    released: str
    released_shape: tuple[int, ...]
    pairs: int | None


def from_released(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """Our state dict from a released one of world size one; dtypes stay as they are.

    A tied model's result holds the shared matrix under both names, as ``model.state_dict()`` does.
    Constants may be left out.

    Raises:
        ValueError: naming every key that is unknown or missing and every shape or constant that is
            wrong.
    """
    entries, constants = _entries(config), _constants(config)
    others = [
        f"{key} is not this model's"
        for key, value in constants.items()
        if key in state_dict and not _same(state_dict[key], value)
    ]
    state_dict = {key: value for key, value in state_dict.items() if key not in constants}
    shapes = {entry.released: entry.released_shape for entry in entries}
    _check(state_dict, shapes, "the released code's", others)
    order = torch.arange(config.z_dim // config.num_heads).view(-1, 2).T.flatten()
    return {
        entry.ours: _reorder(state_dict[entry.released].reshape(entry.shape), entry.pairs, order)
        for entry in entries
    }


def to_released(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """The released code's state dict, world size one, from ``model.state_dict()``.

    Raises:
        ValueError: naming every key that is unknown or missing and every shape that is wrong.
    """
    entries = _entries(config)
    _check(state_dict, {entry.ours: entry.shape for entry in entries}, "MegalodonForCausalLM's")
    order = torch.arange(config.z_dim // config.num_heads).view(2, -1).T.flatten()
    tensors = {
        entry.released: _reorder(state_dict[entry.ours], entry.pairs, order).reshape(
            entry.released_shape
        )
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
    """The tensors of a model of this config."""
    with torch.device("meta"):
        model = MegalodonForCausalLM(copy.deepcopy(config))  # it uses up one of the options
    entries = []
    for name, tensor in model.state_dict().items():
        match = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.(\w+)", name)
        assert match is not None
        layer, module, parameter = match.groups("")
        released = f"{layer}{MODULES.get(module, f'mega.{module}')}.{parameter}"
        shape, ones = tuple(tensor.shape), (1,) * ONES.get(f"{module}.{parameter}", 0)
        entries.append(Entry(name, shape, released, shape + ones, PAIRS.get(module)))
    return entries


def _reorder(tensor: Tensor, axis: int | None, order: Tensor) -> Tensor:
    """Apply `order` inside each head, on the axis of rotary pairs."""
    if axis is None:
        return tensor
    heads = tensor.unflatten(axis, (-1, order.numel()))
    return heads.index_select(axis + 1, order.to(tensor.device)).flatten(axis, axis + 1)


def _check(
    state_dict: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    whose: str,
    others: Sequence[str] = (),
) -> None:
    """Raise one ValueError for all that is wrong, the others included."""
    found = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    wrong = [
        f"{key} is {found.get(key, 'absent')}, must be {wanted.get(key, 'absent')}"
        for key in {**wanted, **found}
        if found.get(key) != wanted.get(key)
    ]
    if wrong := [*wrong, *others]:
        raise ValueError(
            f"the state dict is not {whose}, of world size one and this config: {'; '.join(wrong)}"
        )
