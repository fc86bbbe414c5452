from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest

from megalodon_enwik8 import training
from megalodon_enwik8.training import train

FAULTS = """
import resource, torch
from megalodon_enwik8.device import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults(10)
keep_freed_memory()
faults(20)  # glibc finds a place for each once
print(given_back, faults(10))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, result.stdout.split())
    assert kept < given_back / 20  # huge pages, where they are, make both small


def test_training_asks_for_it(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: asked.append(True))
    assert train(make_tiny("llama", num_batches=1)) == 0
    assert asked == [True]
