"""Processes that share a sequence along time compute what one computes alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F

from megalodon.ops.cema import cema, cema_coefficients, cema_reference
from megalodon.ops.timestep_norm import timestep_norm, timestep_norm_reference
from megalodon.time_parallel import TimeGroup
from tests.processes import outcome, torchrun

from .models import CHUNK, tiny_model
from .test_cema import parameters

WORKER = Path(__file__).with_name("time_parallel_worker.py")
PARTS = 3

Result = TypeVar("Result")


class InThread(TimeGroup):
    """A part that a thread of this process holds."""

    def __init__(self, rank, barrier, slots):
        self.rank, self.size, self.barrier, self.slots = rank, PARTS, barrier, slots

    def gather(self, x):
        self.slots[self.rank] = x
        self.barrier.wait(20)
        found = torch.stack(self.slots)
        self.barrier.wait(20)
        return found


def side_by_side(run):
    """What each part makes of it, all at once."""
    barrier, slots = Barrier(PARTS), [torch.empty(0)] * PARTS
    with ThreadPoolExecutor(PARTS) as pool:
        return list(pool.map(run, [InThread(rank, barrier, slots) for rank in range(PARTS)]))


def values_and_gradients(op, x, leaves, weight, time=None):
    x, *leaves = (t.detach().clone().requires_grad_() for t in (x, *leaves))
    y = op(x, leaves, time)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *leaves])]


def check(op, reference, x, leaves):
    """The parts' values, and gradients of the sum of their losses, against those of the whole."""
    weight = torch.randn_like(x)
    wanted = values_and_gradients(reference, x, leaves, weight)

    def run(time):
        mine, its_weight = (t.chunk(PARTS, dim=1)[time.rank] for t in (x, weight))
        return values_and_gradients(op, mine, leaves, its_weight, time)

    ys, grads, *of_leaves = zip(*side_by_side(run), strict=True)
    found = [torch.cat(ys, 1), torch.cat(grads, 1), *(sum(each) for each in of_leaves)]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 31, 32, 96, 17 * 32])
def test_a_moving_average_in_parts_is_that_of_the_whole(length):
    def op(x, leaves, time):
        return cema(x, cema_coefficients(*leaves), return_state=False, time=time)[0]

    def reference(x, leaves, time):
        return cema_reference(x, cema_coefficients(*leaves))[0]

    leaves = list(parameters(6, 3, torch.float64))
    check(op, reference, torch.randn(2, PARTS * length, 6, dtype=torch.float64), leaves)


@pytest.mark.parametrize("length", [1, 9])
def test_a_norm_in_parts_is_that_of_the_whole(length):
    def op(x, leaves, time):
        return timestep_norm(x, leaves[0], leaves[1], 4, time=time)[0]

    def reference(x, leaves, time):
        return timestep_norm_reference(x, leaves[0], leaves[1], 4)[0]

    x = torch.randn(2, PARTS * length, 12, dtype=torch.float64) + 5
    check(op, reference, x, list(torch.randn(2, 12, dtype=torch.float64)))


def logits_and_gradients(model, text, time=None):
    """Of the sum of losses, by a model of one's own; of a part of the text, or of all of it."""
    model = copy.deepcopy(model)
    model.set_time_group(time)
    ids, targets = text[:, :-1], text[:, 1:]
    if time is not None:
        ids, targets = (t.chunk(PARTS, dim=1)[time.rank] for t in (ids, targets))
    logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


# Roundings alone: of float64, of float32, and of bfloat16 (2^-8 of logits near 4, some times over
# in two layers).
@pytest.mark.parametrize(
    ("dtype", "bound", "autocast", "options"),
    [
        (torch.float64, 1e-10, False, {}),
        (torch.float32, 1e-4, False, {"tie_word_embeddings": False, "swiglu": False}),
        (torch.float32, 0.06, True, {}),
    ],
)
@pytest.mark.parametrize("chunks", [1, 3])
def test_logits_and_gradients_are_those_of_one_process(chunks, dtype, bound, autocast, options):
    model = tiny_model(**options).to(dtype).train()
    text = torch.randint(256, (2, PARTS * chunks * CHUNK + 1))

    def run(time):
        with torch.autocast("cpu", enabled=autocast):  # a thread's own
            return logits_and_gradients(model, text, time)

    whole, wanted = run(None)
    logits, gradients = zip(*side_by_side(run), strict=True)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=bound)
    for parts, want in zip(zip(*gradients, strict=True), wanted, strict=True):
        assert (sum(parts) - want).norm() <= bound * (1 + want.norm())


def test_what_cannot_be_shared_is_refused_by_all():
    model = tiny_model()
    ids = torch.zeros(1, 2 * CHUNK, dtype=torch.int64)

    def run(time):
        mine = copy.deepcopy(model)
        mine.set_time_group(time)
        with pytest.raises(ValueError, match="all must be of one length"):
            mine(ids[:, : CHUNK * (1 + time.rank)])
        with pytest.raises(ValueError, match=f"must be a multiple of chunk_size={CHUNK}"):
            mine(ids[:, 1:])
        with pytest.raises(ValueError, match="padding and document borders"):
            mine(ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0))
        with pytest.raises(ValueError, match="padding and document borders"):
            mine(ids, position_ids=torch.arange(CHUNK).repeat(1, 2))
        with pytest.raises(ValueError, match="labels"):
            mine(ids, labels=ids)
        with pytest.raises(ValueError, match="use_cache"):
            mine(ids, use_cache=True)
        assert mine(ids).logits.shape[1] == 2 * CHUNK

    side_by_side(run)


@pytest.mark.slow
def test_compiled_layers_share_a_sequence_too():
    code, said = outcome(torchrun(2, WORKER))
    assert code == 0, said
