import platform
import resource
from pathlib import Path

import pytest
import torch

from megalodon_enwik8 import training
from megalodon_enwik8.config import load_config
from megalodon_enwik8.device import keep_freed_memory
from megalodon_enwik8.run_folder import NEWEST
from megalodon_enwik8.training import train


def faults(times):
    """Of the pages of so many tensors, each freed before the next."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_faults(queue):
    """Before freed memory is kept, and after."""
    given_back = faults(10)
    keep_freed_memory()
    faults(20)  # glibc finds a place for each once
    queue.put((given_back, faults(10)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_allocation(processes):
    queue = processes.Queue()
    process = processes.Process(target=count_faults, args=(queue,))
    process.start()
    given_back, kept = queue.get(timeout=60)
    process.join()
    assert kept < given_back / 20  # huge pages, where they are, make both small


def test_training_asks_for_it(make_tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: asked.append(True))
    assert train(make_tiny("llama", num_batches=1)) == 0
    assert asked == [True]


@pytest.mark.parametrize(
    ("capability", "machine", "fast"),
    [("AVX2", "x86_64", False), ("AVX512", "x86_64", True), ("DEFAULT", "arm64", True)],
)
def test_auto_is_bfloat16_where_the_processor_has_it_and_is_stored_as_what_it_was(
    capability, machine, fast, make_tiny, monkeypatch, capsys
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: machine)
    config = make_tiny("llama", num_batches=1, use_autocast="auto")
    assert train(config) == 0
    assert load_config(Path(config.run_dir) / "config.yaml").use_autocast is fast
    assert "slow on this processor" not in capsys.readouterr().out
    with monkeypatch.context() as another_processor:
        another_processor.setattr(training, "has_bfloat16", lambda device: not fast)
        longer = make_tiny("llama", num_batches=2, use_autocast="auto")
        assert train(longer, resume=NEWEST) == 0
    capsys.readouterr()
    config = make_tiny("llama", num_batches=1, use_autocast=True, run_dir=f"{config.run_dir}_2")
    assert train(config) == 0
    said = capsys.readouterr().out
    assert ("slow on this processor: use_autocast=auto" in said) is not fast
