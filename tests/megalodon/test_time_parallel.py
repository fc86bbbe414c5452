"""Processes that share a sequence along time compute what one computes alone."""

from pathlib import Path

import pytest
import torch

from megalodon.ops.cema import cema_coefficients, cema_reference, cema_summary, fold_states
from megalodon.ops.timestep_norm import merge_parts, part_statistics, timestep_norm_reference
from tests.processes import outcome, torchrun

from .test_cema import parameters

WORKER = Path(__file__).with_name("time_parallel_worker.py")


@pytest.mark.parametrize("length", [1, 31, 32, 77])
def test_parts_states_fold_into_the_state_of_the_whole(length: int) -> None:
    c = cema_coefficients(*parameters(12, 3, torch.float64))
    x = torch.randn(2, 3 * length, c.omega.shape[0], dtype=torch.float64)
    parts = torch.stack([cema_summary(part, c) for part in x.split(length, dim=1)])
    for count in range(4):
        folded = fold_states(parts, c, length, count)
        if not count:
            assert not folded.any()
            continue
        _, state = cema_reference(x[:, : count * length], c)
        torch.testing.assert_close(folded, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 9])
def test_parts_statistics_merge_into_those_of_the_whole(length: int) -> None:
    x = torch.randn(2, 3 * length, 12, dtype=torch.float64) + 5
    parts = torch.stack([part_statistics(part, 4) for part in x.split(length, dim=1)])
    zero = torch.zeros(12, dtype=torch.float64)
    for count in range(1, 4):
        merged = merge_parts(parts, count, length)
        _, state = timestep_norm_reference(x[:, : count * length], zero, zero, 4)
        torch.testing.assert_close(tuple(merged), tuple(state), rtol=1e-12, atol=1e-12)
    assert not torch.cat([t.flatten() for t in merge_parts(parts, 0, length)]).any()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_one_process(count: int) -> None:
    code, said = outcome(torchrun(count, WORKER))
    assert code == 0, said


@pytest.mark.slow
def test_compiled_layers_share_a_sequence_too() -> None:
    code, said = outcome(torchrun(2, WORKER, "compiled"))
    assert code == 0, said
