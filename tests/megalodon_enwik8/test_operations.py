"""What is counted is what launches something, inside custom operators too, and the committed counts
are those of today's code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalodon_enwik8.benchmark import task as measuring
from megalodon_enwik8.benchmark.__main__ import plan
from megalodon_enwik8.benchmark.operations import DTYPE_COPY, Operations
from megalodon_enwik8.benchmark.task import Task
from megalodon_enwik8.config import MODELS

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
NARROW = {
    "llama": {"dim": 96, "heads": 6, "dim_head": 16},
    "megalodon": {"model_dim": 96, "z_dim": 48, "value_dim": 96, "ffn_hidden_dim": 256},
}


def count(function, *arguments):
    with Operations() as operations:
        function(*arguments)
    return dict(operations.found)


def toy(x):
    """Two operations, views, and memory without content."""
    torch.empty_like(x)
    return (x.t().unsqueeze(0)[..., :2] * 2).sum()


@pytest.fixture
def toy_operator():
    """x -> x sin(x) and a padded copy that goes nowhere: three operations; x -> cos(x) in the
    backward: two."""

    @torch.library.custom_op("test_operations::toy", mutates_args=())
    def forward(x: Tensor) -> Tensor:
        torch.nn.functional.pad(x, (0, 1))
        return x * x.sin()

    @torch.library.custom_op("test_operations::toy_backward", mutates_args=())
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x.cos()

    forward.register_autograd(
        lambda ctx, grad: backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return forward


def test_views_and_memory_without_content_are_left_out():
    assert count(toy, torch.ones(2, 3)) == {"aten.mul.Tensor": 1, "aten.sum.default": 1}


def test_what_writes_in_place_is_counted():
    x = torch.ones(3)
    found = count(lambda: (x.add_(1), x[1:].mul_(2), torch.sin(x, out=x)))
    assert found == {"aten.add_.Tensor": 1, "aten.mul_.Tensor": 1, "aten.sin.out": 1}


def test_copies_to_another_dtype_are_told_from_others():
    x, y = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    found = count(lambda: (x.bfloat16(), x.copy_(y), x.copy_(x + 1), x.clone(), x.float()))
    assert found.pop(DTYPE_COPY) == 2
    assert found == {"aten.copy_.default": 1, "aten.add.Tensor": 1, "aten.clone.default": 1}


def test_a_custom_operator_counts_as_what_it_does_inside(toy_operator):
    x = torch.ones(2, 3, requires_grad=True)
    with Operations() as forward:
        y = toy_operator(x)
    with Operations() as backward:
        y.sum().backward()
    assert forward.found == {
        "aten.constant_pad_nd.default": 1, "aten.sin.default": 1, "aten.mul.Tensor": 1,
    }  # fmt: skip
    of_the_sum = {"aten.sum.default": 1, "aten.ones_like.default": 1}
    assert backward.found == {"aten.cos.default": 1, "aten.mul.Tensor": 1, **of_the_sum}
    assert torch.equal(y, x * x.sin())
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())


@pytest.fixture
def narrow(monkeypatch):
    """Models a quarter as wide: no number of operations depends on a width."""
    whole = Task.config

    def config(self, model):
        return whole(self, model).model_copy(update=NARROW[model])

    monkeypatch.setattr(Task, "config", config)


((_, (COUNT, _)),) = plan("count", {}, 1)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("model", MODELS)
def test_the_committed_counts_are_those_of_the_code(model):
    """Another version of PyTorch may take operations apart in another way."""
    committed = json.loads((RESULTS / "count.json").read_text())
    if committed["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with PyTorch {committed['torch']}")
    with measuring.as_on_a_gpu():
        found = measuring.block_operations(replace(COUNT, model=model))
    for part in ("forward", "backward"):
        assert found[part] == committed["rows"][0][model]["by_name"][part], (
            "count again: see Measuring in docs/speed.md"
        )


@pytest.mark.usefixtures("narrow")
def test_attention_is_one_operation_each_way():
    with measuring.as_on_a_gpu():
        found = measuring.block_operations(COUNT)
    for part in ("forward", "backward"):
        assert sum(n for name, n in found[part].items() if "dot_product" in name) == 1
        assert not any("softmax" in name for name in found[part])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_step_and_a_compiled_block_are_counted(model, tmp_path):
    """Of two layers in float32, which is quick: a step has both layers' operations and more; the
    compiler makes of a block fewer kernels than it has operations."""
    settings = COUNT.settings | measuring.layers(2) | {"use_autocast": False}
    task = replace(COUNT, model=model, settings=settings)
    figures = measuring.measure_apart(task, 600, str(tmp_path))[model]
    one = [figures[f"operations {part}"] for part in ("forward", "backward")]
    assert figures["operations of a step"] > 2 * sum(one)
    for part, operations in zip(("forward", "backward"), one, strict=True):
        assert 0 < figures[f"compiled kernels {part}"] < operations
        assert 0 < figures[f"dtype copies {part}"] < operations
