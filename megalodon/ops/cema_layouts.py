"""How the numbers of CEMA's blocks lie in memory while matrices are multiplied with them.

A block has K numbers a channel: T inputs, and beside them the 2N numbers of a state. Every channel
has matrices of its own. There are two layouts, for no way to take such products is the best one
everywhere: :class:`ByChannel`, and on x86 in float32 :class:`ByBlock`, which moves less
(docs/speed.md has the times).

In both, time and channels change places within a block, whose T x D numbers a cache holds.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import group_blocks

IMAGE = 8
"""Blocks that :class:`ByBlock` convolves as one image."""


class BlockLayout(Protocol):
    """B sequences of L steps in blocks of T, the last ones filled up with zeros."""

    @staticmethod
    def empty(x: Tensor, blocks: int, size: int) -> Tensor:
        """Room for the blocks of x (B, L, D), of K = size numbers a channel."""

    @staticmethod
    def lay_out(x: Tensor, block: int, order: int) -> Tensor:
        """The inputs x (B, L, D) in this layout, maybe with room for the 2N = 2 order numbers of
        the states."""

    @staticmethod
    def sum_up(inputs: Tensor, matrices: Tensor) -> Tensor:
        """Every block's inputs times matrices (T, D, 2N): (B, blocks, D, 2N)."""

    @staticmethod
    def join(inputs: Tensor, states: Tensor) -> Tensor:
        """The inputs with states (B, blocks, D, 2N) beside them; the inputs are then used up."""

    @staticmethod
    def read_out(
        joined: Tensor, kernel: Tensor, matrices: Tensor, length: int, *, adjoint: bool = False
    ) -> Tensor:
        """Inputs times the Toeplitz matrix of kernel (T, D), or times its transpose, plus states
        times matrices (T, D, 2N): (B, length, D)."""

    @staticmethod
    def inner(left: Tensor, right: Tensor) -> Tensor:
        """Products of all pairs of a channel's numbers, summed over blocks: (D, K, K)."""


class ByChannel:
    """(D, B, blocks, K): plain batched products; blocks move between layouts as whole rows."""

    @staticmethod
    def empty(x: Tensor, blocks: int, size: int) -> Tensor:
        return x.new_empty(x.shape[2], x.shape[0], blocks, size)

    @staticmethod
    def lay_out(x: Tensor, block: int, order: int) -> Tensor:
        blocks = _whole_blocks(x, block)
        rows = blocks.transpose(2, 3).contiguous()
        columns = ByChannel.empty(x, blocks.shape[1], block + 2 * order)
        columns[..., :block] = rows.permute(2, 0, 1, 3)
        return columns

    @staticmethod
    def sum_up(inputs: Tensor, matrices: Tensor) -> Tensor:
        rows = inputs.flatten(1, 2)[..., : matrices.shape[0]]
        sums = torch.bmm(rows, matrices.transpose(0, 1))
        return sums.view(*inputs.shape[:3], -1).permute(1, 2, 0, 3).contiguous()

    @staticmethod
    def join(inputs: Tensor, states: Tensor) -> Tensor:
        # Cast apart: a copy that both casts and permutes is slow.
        inputs[..., -states.shape[-1] :] = states.to(inputs.dtype).permute(2, 0, 1, 3)
        return inputs

    @staticmethod
    def read_out(
        joined: Tensor, kernel: Tensor, matrices: Tensor, length: int, *, adjoint: bool = False
    ) -> Tensor:
        toeplitz = _toeplitz(kernel, lower=adjoint)
        weight = torch.cat([toeplitz, matrices.permute(1, 2, 0)], dim=1)
        y = torch.bmm(joined.flatten(1, 2), weight)  # (D, B blocks, T)
        y = y.transpose(0, 1).contiguous().transpose(1, 2).contiguous()
        return _without_filling(y.view(joined.shape[1], -1, joined.shape[0]), length)

    @staticmethod
    def inner(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2))


class ByBlock:
    """(B, blocks, D, K): grouped 1 x 1 convolutions, which take blocks in the order in which they
    come, and which oneDNN runs faster than MKL does small batched products."""

    @staticmethod
    def empty(x: Tensor, blocks: int, size: int) -> Tensor:
        return x.new_empty(x.shape[0], blocks, x.shape[2], size)

    @staticmethod
    def lay_out(x: Tensor, block: int, order: int) -> Tensor:
        return _exchange(_whole_blocks(x, block))

    @staticmethod
    def sum_up(inputs: Tensor, matrices: Tensor) -> Tensor:
        return ByBlock._convolve(inputs, _exchange(matrices.flatten(1)))

    @staticmethod
    def join(inputs: Tensor, states: Tensor) -> Tensor:
        return torch.cat([inputs, states.to(inputs.dtype)], dim=-1)

    @staticmethod
    def read_out(
        joined: Tensor, kernel: Tensor, matrices: Tensor, length: int, *, adjoint: bool = False
    ) -> Tensor:
        toeplitz = _toeplitz(kernel, lower=not adjoint)
        weight = torch.cat([toeplitz, matrices.transpose(0, 1)], dim=2)
        y = _exchange(ByBlock._convolve(joined, weight.flatten(0, 1)))
        return _without_filling(y.flatten(1, 2), length)

    @staticmethod
    def inner(left: Tensor, right: Tensor) -> Tensor:
        # As whole rows by channel first: a product that reads them where they are takes longer.
        left, right = (t.flatten(0, 1).transpose(0, 1).contiguous() for t in (left, right))
        return torch.bmm(left.transpose(1, 2), right)

    @staticmethod
    def _convolve(blocks: Tensor, weight: Tensor) -> Tensor:
        """(B, blocks, D, K), (D M, K) -> (B, blocks, D, M)."""
        count, dim, size = blocks.shape[1:]
        # A few blocks are an image: all of them in one would make the convolution read each
        # channel from end to end of the text, before it comes to the next.
        pixels = IMAGE if count % IMAGE == 0 else count
        image = blocks.view(-1, pixels, 1, dim * size).permute(0, 3, 1, 2)
        if image.shape[0] < 16 and torch.get_num_threads() == 1 and blocks.dtype == torch.float32:
            # There conv2d does without oneDNN, and goes channel by channel.
            matrices = weight.view(dim, -1, size).transpose(1, 2)
            y = torch.bmm(blocks.flatten(0, 1).transpose(0, 1), matrices).transpose(0, 1)
        else:
            y = F.conv2d(image, weight[..., None, None], groups=dim).permute(0, 2, 3, 1)
        return y.contiguous().view(*blocks.shape[:3], -1)


def choose_layout(x: Tensor) -> type[BlockLayout]:
    """The one for tensors like x. In bfloat16 it is :class:`ByChannel` because of the backward,
    whose inner products want the blocks by channel in any case."""
    convolves = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )
    return ByBlock if convolves else ByChannel


def toeplitz_adjoint(grad: Tensor) -> Tensor:
    """The adjoint of an upper Toeplitz matrix: (D, T, T) -> (T, D)."""
    dim, size, _ = grad.shape
    rows = F.pad(F.pad(grad, (0, size - 1)).flatten(1), (0, size))
    return rows.view(dim, size, 2 * size)[..., :size].sum(1).t()


def _toeplitz(kernel: Tensor, *, lower: bool) -> Tensor:
    """(T, D) -> (D, T, T) with [s, t] = kernel[t - s] for t >= s and 0 below; or its transpose.

    A row of length 2T repeated T times and read with row length 2T - 1 shifts by one per row.
    """
    (size, dim), kernel = kernel.shape, kernel.t()
    zeros = kernel.new_zeros(dim, size)
    parts = [kernel[:, :1], zeros, kernel[:, 1:].flip(1)] if lower else [kernel, zeros]
    rows = torch.cat(parts, dim=1).unsqueeze(1).expand(dim, size, 2 * size).flatten(1)
    return rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size]


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    """(B, L, D) -> (B, blocks, T, D), contiguous."""
    size, groups = group_blocks(-(-x.shape[1] // block))
    missing = size * groups * block - x.shape[1]
    x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.unflatten(1, (-1, block))


def _without_filling(y: Tensor, length: int) -> Tensor:
    return y if y.shape[1] == length else y[:, :length].contiguous()


def _exchange(x: Tensor) -> Tensor:
    """(..., M, N), contiguous -> (..., N, M), as channels of pixels shuffled: the one operation of
    PyTorch's that transposes small matrices in registers."""
    *batch, m, n = x.shape
    pixels = x.view(1, -1, 1, m * n).permute(0, 3, 1, 2)
    return F.channel_shuffle(pixels, m).permute(0, 2, 3, 1).view(*batch, n, m)
