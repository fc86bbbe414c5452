"""What each of several processes checks of a Megalodon whose sequences they share along time."""

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalodon.time_parallel import TimeGroup
from tests.megalodon.models import CHUNK, tiny_model


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def check_equal(
    rank: int, size: int, dtype: torch.dtype, bound: float, autocast: bool = False, **options: Any
) -> None:
    """Logits of each part and gradients, against the whole sequence in one process."""
    model = tiny_model(**options).to(dtype).train()
    for chunks in (1, 3):
        length = chunks * CHUNK
        text = torch.randint(
            256, (2, size * length + 1), generator=torch.Generator().manual_seed(1)
        )
        part = slice(rank * length, (rank + 1) * length)
        with torch.autocast("cpu", enabled=autocast):
            whole = model(text[:, :-1]).logits
            loss_of(whole, text[:, 1:]).backward()
            wanted = gradients(model)
            model.set_time_group(TimeGroup())
            mine = model(text[:, :-1][:, part]).logits
            loss_of(mine, text[:, 1:][:, part]).backward()
            model.set_time_group(None)
        torch.testing.assert_close(mine, whole[:, part], rtol=0, atol=bound)
        for got, want in zip(gradients(model), wanted, strict=True):
            dist.all_reduce(got)
            assert (got - want).norm() <= bound * (1 + want.norm()), (got - want).norm()


def check_refusals(rank: int) -> None:
    model = tiny_model()
    model.set_time_group(TimeGroup())
    ids = torch.zeros(1, 2 * CHUNK, dtype=torch.int64)
    with pytest.raises(ValueError, match="all must be of one length"):
        model(ids[:, : CHUNK * (1 + rank)])
    with pytest.raises(ValueError, match=f"must be a multiple of chunk_size={CHUNK}"):
        model(ids[:, 1:])
    with pytest.raises(ValueError, match="padding and document borders"):
        model(ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(ValueError, match="padding and document borders"):
        model(ids, position_ids=torch.arange(CHUNK).repeat(1, 2))
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="use_cache"):
        model(ids, use_cache=True)
    assert model(ids).logits.shape[1] == 2 * CHUNK


if __name__ == "__main__":
    dist.init_process_group("gloo")
    place = (dist.get_rank(), dist.get_world_size())
    if "compiled" in sys.argv:
        torch.manual_seed(0)
        model = tiny_model().train()
        text = torch.randint(256, (2, 2 * CHUNK), generator=torch.Generator().manual_seed(place[0]))
        model.set_time_group(TimeGroup())
        found = []
        for compiled in (False, True):
            if compiled:
                for layer in model.model.layers:
                    layer.compile(dynamic=False)
            logits = model(text).logits
            logits.square().sum().backward()
            found.append([logits, *gradients(model)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    else:
        # Roundings alone: of float64, of float32, and of bfloat16 (2^-8 of logits near 4, some
        # times over in two layers).
        check_equal(*place, torch.float64, 1e-10)
        check_equal(*place, torch.float32, 1e-4, tie_word_embeddings=False, swiglu=False)
        check_equal(*place, torch.float32, 0.06, autocast=True)
        check_refusals(place[0])
    dist.destroy_process_group()
