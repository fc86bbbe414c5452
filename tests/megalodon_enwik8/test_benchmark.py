import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalodon_enwik8 import benchmark, benchmark_train
from megalodon_enwik8.errors import UserError


def test_micro_batches_that_do_not_divide_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--micro-batches 3: must divide 16"):
        benchmark.main(["train", "--micro-batches", "3", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_unknown_mode_is_one_line() -> None:
    with pytest.raises(UserError, match="invalid choice: 'fast'"):
        benchmark.parse(["train", "--modes", "fast"])


def test_functions_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = benchmark_train._alternate(functions, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_bound_is_three_times_the_forward_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in multiplications: 3 x sequences x length x weights."""
    counted = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.dtype == weight.dtype == torch.bfloat16
        counted.append(x.shape[0] * weight.numel())

    products = benchmark_train._matrix_products("llama", 4, 8, torch.device("cpu"))
    monkeypatch.setattr(benchmark_train.F, "linear", linear)
    products()
    # 12,489,600 parameters but the 13 norms; the tied embedding is the output matrix.
    assert sum(counted) == 3 * 16 * 8 * (12_489_600 - 13 * 384)


def test_peak_memory_is_the_processes_own_not_its_parents() -> None:
    ballast = torch.ones(600_000_000, dtype=torch.uint8)
    code = "from megalodon_enwik8.utils import *; print(peak_memory_bytes(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < ballast.nbytes


@pytest.mark.slow
def test_report_holds_what_the_table_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "1", "--modes", "eager", "--micro-batches", "16", "--seq-len", "16"]
    assert benchmark.main(["train", *arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["megalodon", "llama"]
    assert all(row["peak_memory_bytes"] > 10**8 for row in report["rows"])
    (ratio,) = report["ratios"]
    assert f"| eager | 16 | {ratio['time']:.2f} |" in (tmp_path / "train.md").read_text()
    assert "Megalodon / Llama" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(benchmark_train, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="file"):
        benchmark.main(["train", "--out", str(tmp_path / "file" / "here")])
