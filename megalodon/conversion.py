"""Weights to and from the names of the released code (github.com/XuezheMax/megalodon).

    model = MegalodonForCausalLM(MegalodonConfig.mega1_3b())
    model.load_state_dict(from_released(torch.load(path, weights_only=True), model.config))

One table, :data:`MODEL` and :data:`LAYER`, states every name and shape. It was written without
access to the released files; what could not be checked against them is, most doubtful first:

- ``omega`` may lack its last axis (axes of length one are free here in any case), and ``gamma``
  of CEMA may be stored as a complex (D, N) tensor where real and imaginary part are expected;
- the names of the embedding, the last norm and the output matrix (``embed``, ``norm``,
  ``output``), and that a tied model stores no ``output.weight``;
- that no constants are stored beside the parameters, such as rotary frequencies or a prior of
  TimestepNorm;
- that row 0 of the attention's ``gamma`` and ``beta`` makes queries and row 1 keys, and that
  ``fc1`` is the gated matrix of SwiGLU, ``fc3`` the other;
- that its rotary embedding, in complex arithmetic, turns adjacent pairs (2i, 2i + 1) of a head.
  Here the pairs are (i, i + d/2): the same scores once the rows of ``wz`` and the columns of
  ``gamma`` and ``beta`` are permuted inside each head, on the axes marked ``~`` in the table.

A file that differs is refused with every differing name and shape, so that nothing is ever
loaded into the wrong place; correct the table then.
"""

from collections.abc import Iterable, Mapping
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
    Entry("model.final_norm.weight", "norm.weight", "D"),
    Entry("model.final_norm.bias", "norm.bias", "D"),
    Entry("lm_head.weight", "output.weight", "V D", "untied"),
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

    Raises:
        ValueError: naming every key that is unknown or missing and every shape that is wrong.
    """
    entries = _entries(config)
    sizes = _sizes(config)
    shapes = {entry.released: _shape(entry, sizes) for entry in entries}
    _check(state_dict, shapes, "the released code's", free_ones=True)
    order = torch.arange(config.z_dim // config.num_heads).view(-1, 2).T.flatten()
    result = {
        entry.ours: _reorder(
            state_dict[entry.released].reshape(_our_shape(entry, sizes)), entry, order
        )
        for entry in entries
    }
    if config.tie_word_embeddings:
        result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result


def to_released(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> dict[str, Tensor]:
    """The released code's state dict, world size one, from ``model.state_dict()``.

    Raises:
        ValueError: naming every key that is unknown or missing and every shape that is wrong.
    """
    if config.tie_word_embeddings:
        state_dict = {key: value for key, value in state_dict.items() if key != "lm_head.weight"}
    entries = _entries(config)
    sizes = _sizes(config)
    shapes = {entry.ours: _our_shape(entry, sizes) for entry in entries}
    _check(state_dict, shapes, "MegalodonForCausalLM's", free_ones=False)
    order = torch.arange(config.z_dim // config.num_heads).view(2, -1).T.flatten()
    return {
        entry.released: _reorder(state_dict[entry.ours], entry, order).reshape(_shape(entry, sizes))
        for entry in entries
    }


def _entries(config: MegalodonConfig) -> list[Entry]:
    """The tensors of a model of this config, layers numbered."""
    options = {
        "untied": not config.tie_word_embeddings,
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


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


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
    *,
    free_ones: bool,
) -> None:
    """Raise one ValueError for all that is wrong."""

    def differs(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        return _without_ones(found) != _without_ones(wanted) if free_ones else found != wanted

    unknown = [key for key in state_dict if key not in shapes]
    missing = [key for key in shapes if key not in state_dict]
    wrong = [
        f"{key} is {found}, must be {wanted}"
        for key, wanted in shapes.items()
        if key in state_dict and differs(found := tuple(state_dict[key].shape), wanted)
    ]
    problems = [
        f"{name}: {', '.join(keys)}"
        for name, keys in (("unknown", unknown), ("missing", missing), ("of another shape", wrong))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the state dict is not {whose}, of world size one and this config; "
            + "; ".join(problems)
        )
