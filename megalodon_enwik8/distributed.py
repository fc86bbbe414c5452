"""The processes of a run, which torchrun starts, and what each of them does.

Every process trains on its share of a step's sequences, or along time on its part of each; the
gradients are averaged over all, once a step. PyTorch does the work: DistributedDataParallel,
fully_shard, a DeviceMesh. One process alone is a world of one, in which nothing of it happens.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from megalodon.time_parallel import TimeGroup
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.models import decoder_layers
from megalodon_enwik8.safety import UserError, launched

HANG_S = 45.0
"""How long a process waits for another before it takes it for lost."""

PATIENCE_S = 3600.0
"""The same, for what takes long: fetching the text, writing a checkpoint."""

T = TypeVar("T")


class World:
    """The processes of a run, as seen by this one: alone, unless `join` says else.

    along_data, along_time: this one's place and how many there are, of those that share out
    sequences, and of those that share each sequence out along time.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, size: int = 1, chunk_parallel: int = 1
    ) -> None:
        self.device, self.rank, self.size = device, rank, size
        if size % chunk_parallel:
            raise UserError(
                f"chunk_parallel={chunk_parallel}: needs a multiple of {chunk_parallel} processes, "
                f"as in torchrun --nproc_per_node={chunk_parallel}"
            )
        self.along_data = (rank // chunk_parallel, size // chunk_parallel)
        self.along_time = (rank % chunk_parallel, chunk_parallel)
        self.patient: dist.ProcessGroup | None = None
        if size > 1:
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_S))
        self.time_group: TimeGroup | None = None
        if chunk_parallel > 1:
            shape = (size // chunk_parallel, chunk_parallel)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "time"))
            self.time_group = TimeGroup(mesh["time"].get_group())

    @property
    def is_main(self) -> bool:
        """Whether this one writes, and says what there is to say."""
        return self.rank == 0

    def check(self, config: ExperimentConfig) -> None:
        """Raise UserError unless the batch serves all, and all can do what the config asks for."""
        if config.sequences_per_step % self.along_data[1]:
            raise UserError(
                f"batch_size x grad_accum_every={config.sequences_per_step}: must be a multiple of "
                f"the {self.along_data[1]} processes that share the sequences of a step"
            )
        if config.shard and self.size == 1:
            raise UserError("shard=true: has nobody to share with; start it with torchrun")
        if config.compile == "graphs" and self.size > 1:
            raise UserError("compile=graphs: is for one process; set compile: true")

    def sequences(self, count: int) -> range:
        """This process's share of the `count` sequences of a step."""
        place, places = self.along_data
        share = count // places
        return range(place * share, (place + 1) * share)

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of sequences (B, L + 1) along time, with the byte after it."""
        place, count = self.along_time
        length = (batch.shape[1] - 1) // count
        return batch[:, place * length : (place + 1) * length + 1]

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's share of items that all have, and whether it counts: each gets as many,
        since a sharded model runs in all of them or in none."""
        last = len(items) - 1
        turns = [start + self.rank for start in range(0, len(items), self.size)]
        return [(items[min(turn, last)], turn <= last) for turn in turns]

    def distribute(self, model: PreTrainedModel, config: ExperimentConfig) -> torch.nn.Module:
        """What trains `model` with all others: a wrapper, or with `shard` the model itself."""
        if self.size == 1:
            return model
        if not config.shard:
            return DistributedDataParallel(model)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        return cast(torch.nn.Module, fully_shard(model, mesh=mesh))

    def backward_of(self, model: torch.nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward: gradients are averaged after the last of a step alone."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    @contextmanager
    def sharing_time(self, model: PreTrainedModel) -> Iterator[None]:
        """While the block runs, sequences come in parts."""
        with ExitStack() as stack:
            if self.time_group is not None:
                model.set_time_group(self.time_group)  # type: ignore[operator]
                stack.callback(model.set_time_group, None)  # type: ignore[arg-type]
            yield

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all."""
        if self.size > 1:
            total = x.to(self.device)
            dist.all_reduce(total)
            x.copy_(total)
        return x

    def largest(self, number: int) -> int:
        """Over all."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def from_main(self, value: T) -> T:
        """What the first process has."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(self.patient)

    def wait_for_main(self) -> None:
        """Until the first process is here, which waits for nobody."""
        if self.size > 1:
            dist.broadcast(torch.zeros(1), 0, self.patient)


@contextmanager
def join(device: torch.device, chunk_parallel: int = 1) -> Iterator[World]:
    """The world of this process, while the block runs: of those that torchrun started, or that a
    caller has put into a process group. All but the first say nothing."""
    joined = dist.is_initialized()
    if not joined and launched():
        if device.type == "mps":
            raise UserError("torchrun: several processes need NVIDIA GPUs, or FORCE_DEVICE=cpu")
        if device.type == "cuda":
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= there:
                raise UserError(f"torchrun: a process needs a GPU: --nproc_per_node={there} here")
            torch.cuda.set_device(place)
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=HANG_S)
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store = PrefixStore(_meet(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        with ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield World(device, rank, size, chunk_parallel)
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


def _meet(store: Store, rank: int, size: int) -> str:
    """A name that the processes now here have in common, and none before a restart had.

    torchrun keeps its store over restarts, with the addresses of the lost, and each machine counts
    its own restarts alone. So everybody draws a number that nobody had before, and the first
    process, whose number is the name, tells it to the numbers drawn until all others have it.
    """
    number = store.add("drawn", 1)
    if rank:
        name: str = store.get(f"{number} is with").decode()
        store.add(f"{name} has with it", 1)
        return name
    told, deadline = 0, time.monotonic() + HANG_S
    while store.add(f"{number} has with it", 0) < size - 1:
        if time.monotonic() > deadline:
            raise DistStoreError("a process has not come")
        drawn = store.add("drawn", 0)
        for other in range(told + 1, drawn + 1):
            store.set(f"{other} is with", str(number))
        told = drawn
        time.sleep(0.01)
    return str(number)


def whole(state: Any) -> Any:
    """Nested dicts of tensors, with those that are spread over processes put together."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def spread_like(parameter: torch.Tensor, moments: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An optimizer's numbers for a parameter, spread over the processes as it is."""
    if not isinstance(parameter, DTensor):
        return moments
    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value, mesh, placements) if value.dim() else value
        for name, value in moments.items()
    }
