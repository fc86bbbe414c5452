"""Processes that share a sequence along time compute what one computes alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

from megalodon.ops.cema import cema, cema_coefficients, cema_reference
from megalodon.ops.timestep_norm import timestep_norm, timestep_norm_reference
from megalodon.time_parallel import TimeGroup
from tests.processes import outcome, torchrun

from .test_cema import parameters

WORKER = Path(__file__).with_name("time_parallel_worker.py")
PARTS = 3

Op = Callable[[Tensor, list[Tensor], TimeGroup | None], Tensor]


class InThread(TimeGroup):
    """A part that a thread of this process holds."""

    def __init__(self, rank: int, barrier: Barrier, slots: list[Tensor]) -> None:
        self.rank, self.barrier, self.slots = rank, barrier, slots

    def gather(self, x: Tensor) -> Tensor:
        self.slots[self.rank] = x
        self.barrier.wait(20)
        found = torch.stack(self.slots)
        self.barrier.wait(20)
        return found


def values_and_gradients(
    op: Op, x: Tensor, leaves: list[Tensor], weight: Tensor, time: TimeGroup | None = None
) -> list[Tensor]:
    x, *leaves = (t.detach().clone().requires_grad_() for t in (x, *leaves))
    y = op(x, leaves, time)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *leaves])]


def check(op: Op, reference: Op, x: Tensor, leaves: list[Tensor]) -> None:
    """The parts' values, and gradients of the sum of their losses, against those of the whole."""
    weight = torch.randn_like(x)
    wanted = values_and_gradients(reference, x, leaves, weight)
    barrier, slots = Barrier(PARTS), [x] * PARTS

    def run(rank: int) -> list[Tensor]:
        mine, its_weight = (t.chunk(PARTS, dim=1)[rank] for t in (x, weight))
        return values_and_gradients(op, mine, leaves, its_weight, InThread(rank, barrier, slots))

    with ThreadPoolExecutor(PARTS) as pool:
        ys, grads, *of_leaves = zip(*pool.map(run, range(PARTS)), strict=True)
    found = [torch.cat(ys, 1), torch.cat(grads, 1), *(sum(each) for each in of_leaves)]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 31, 32, 96, 17 * 32])
def test_a_moving_average_in_parts_is_that_of_the_whole(length: int) -> None:
    def op(x: Tensor, leaves: list[Tensor], time: TimeGroup | None) -> Tensor:
        return cema(x, cema_coefficients(*leaves), return_state=False, time=time)[0]

    def reference(x: Tensor, leaves: list[Tensor], time: TimeGroup | None) -> Tensor:
        return cema_reference(x, cema_coefficients(*leaves))[0]

    leaves = list(parameters(6, 3, torch.float64))
    check(op, reference, torch.randn(2, PARTS * length, 6, dtype=torch.float64), leaves)


@pytest.mark.parametrize("length", [1, 9])
def test_a_norm_in_parts_is_that_of_the_whole(length: int) -> None:
    def op(x: Tensor, leaves: list[Tensor], time: TimeGroup | None) -> Tensor:
        return timestep_norm(x, leaves[0], leaves[1], 4, time=time)[0]

    def reference(x: Tensor, leaves: list[Tensor], time: TimeGroup | None) -> Tensor:
        return timestep_norm_reference(x, leaves[0], leaves[1], 4)[0]

    x = torch.randn(2, PARTS * length, 12, dtype=torch.float64) + 5
    check(op, reference, x, list(torch.randn(2, 12, dtype=torch.float64)))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_one_process(count: int) -> None:
    code, said = outcome(torchrun(count, WORKER))
    assert code == 0, said


@pytest.mark.slow
def test_compiled_layers_share_a_sequence_too() -> None:
    code, said = outcome(torchrun(2, WORKER, "compiled"))
    assert code == 0, said
