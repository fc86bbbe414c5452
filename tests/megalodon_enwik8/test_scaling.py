"""The cost model says what processes send, to the byte, and what the released sizes hold."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.distributed import World
from megalodon_enwik8.models import byte_losses
from megalodon_enwik8.scaling import Costs, Device

from ..megalodon.models import tiny_config

# Two processes fill up the rows of what has 41.
ODD = tiny_config(ffn_hidden_dim=41, tie_word_embeddings=False)


class Counter(TorchDispatchMode):
    """Notes of each collective its name and the bytes that all processes hold together: the larger
    of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [
                sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor))
                for arg in args
            ]
            self.found.append((func.__name__, max(sizes)))
        return func(*args, **(kwargs or {}))


@contextmanager
def joined(rank, file, chunk_parallel):
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    try:
        yield World(torch.device("cpu"), rank, 2, chunk_parallel)
    finally:
        dist.destroy_process_group()


def count_along_time(rank, file, queue):
    """What the first process of two hands to collectives, for one step at each length."""
    with joined(rank, file, 2) as world:
        model = MegalodonForCausalLM(tiny_config())
        for sequences, length in ((1, 1024), (1, 8192), (3, 1024)):
            batch = torch.zeros(sequences, length + 1, dtype=torch.int64)
            with world.sharing_time(model), Counter() as counter:
                byte_losses(model, world.part(batch)).sum().backward()
            if rank == 0:
                queue.put(counter.found)


def count_gradients(rank, file, queue):
    """The same of DDP and FSDP2, for one step of two micro-batches."""
    with joined(rank, file, 1) as world:
        for shard in (False, True):
            model = MegalodonForCausalLM(ODD)
            learner = world.distribute(model, ExperimentConfig.model_construct(shard=shard))
            with Counter() as counter:
                for last in (False, True):
                    with world.backward_of(learner, last=last):
                        byte_losses(learner, torch.zeros(1, 17, dtype=torch.int64)).sum().backward()
            if rank == 0:
                queue.put(counter.found)


def counted(processes, target, file, times):
    queue = processes.Queue()
    both = [processes.Process(target=target, args=(rank, file, queue)) for rank in range(2)]
    for process in both:
        process.start()
    found = [queue.get(timeout=60) for _ in range(times)]
    for process in both:
        process.join()
    return found


def sent(counts):
    """By each of two processes, round a ring."""
    return sum(size * (1.0 if "allreduce" in name else 0.5) for name, size in counts)


def test_bytes_along_time_are_those_of_the_formula_at_any_length(processes, tmp_path):
    config, costs = tiny_config(), Costs(tiny_config())
    short, long, three = counted(processes, count_along_time, tmp_path / "store", 3)
    assert short == long
    for sequences, found in ((1, short), (3, three)):
        layer, step = costs.along_time(2, sequences)
        assert sent(found) == step
        assert all("gather" in name for name, _ in found)
        _, *forward = found[: 2 + 2 * config.num_layers]
        backward = found[len(forward) + 1 :]
        assert [size for _, size in backward] == [size for _, size in reversed(forward)]
        for index in range(0, 2 * config.num_layers, 2):
            assert 2 * sent(forward[index : index + 2]) == layer


def test_bytes_of_gradients_and_weights_are_those_of_the_formula(processes, tmp_path):
    costs = Costs(ODD)
    ddp, fsdp = counted(processes, count_gradients, tmp_path / "store", 2)
    assert sent(ddp) == costs.data_parallel(2).step
    layer, step = costs.sharded(2, micro_batches=2)
    assert sent(fsdp) == step
    assert 5 * sent(fsdp[1:2]) == layer  # behind the gathering of what lies in no layer


def test_arithmetic_is_what_a_step_computes():
    """As PyTorch counts it, which sees nothing of CEMA and both halves of attention, and does not
    count the few weights outside matrices."""
    config, tokens = tiny_config(chunk_size=64), 512
    model, costs = MegalodonForCausalLM(config), Costs(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        byte_losses(model, torch.zeros(1, tokens + 1, dtype=torch.int64)).sum().backward()
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    cema = 2 * 32 * (2 * 32 + 8 * config.cema_ndim)  # layers, channels, four products
    unseen = 2 * config.chunk_size * (config.z_dim + config.value_dim)
    rest = 2 * (costs.parameters - matrices)
    counted = counter.get_total_flops()
    assert costs.flops(tokens) == counted + 3 * tokens * (cema - unseen + rest)


def test_sending_pays_from_the_fewest_tokens_and_up_to_the_most_processes():
    costs, device = Costs(MegalodonConfig.mega200m()), Device(4e14, 5e10, 0.25)

    def share(sent, tokens):
        return sent.step / device.link / (costs.flops(tokens) / device.flops)

    for sent in (costs.data_parallel(8), costs.sharded(64), costs.along_time(64)):
        least = costs.least_tokens(sent, device)
        assert share(sent, least) <= device.share < share(sent, least - 1)
    most = costs.most_along_time(2**20, device)
    assert share(costs.along_time(most), 2**20 // most) <= device.share
    assert share(costs.along_time(2 * most), 2**20 // (2 * most)) > device.share


def test_a_part_is_never_shorter_than_a_chunk():
    costs, device = Costs(tiny_config(chunk_size=8)), Device(1.0, 1e9, 0.25)
    assert [costs.most_along_time(tokens, device) for tokens in (8, 12, 64, 96)] == [1, 1, 8, 4]
