"""The committed results: RESULTS.md and the README's headline are what the report makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalodon_enwik8.report import main

ROOT = Path(__file__).parents[2]


def test_the_pages_are_made_from_the_committed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    options = {
        "--out": tmp_path / "RESULTS.md",
        "--context": "results/benchmarks/context.json",
        "--speed": "results/benchmarks/train.json",
        "--readme": readme,
    }
    words = [str(word) for option in options.items() for word in option]
    assert main(["results", *words]) == 0
    for made in (tmp_path / "RESULTS.md", readme):
        assert made.read_text(encoding="utf-8") == (ROOT / made.name).read_text(encoding="utf-8")
    pictures = sorted((tmp_path / "results").iterdir())
    assert pictures
    for picture in pictures:
        assert digest(picture) == digest(ROOT / "results" / picture.name)


def digest(picture: Path) -> str:
    """What an SVG says of the points that it shows."""
    found = re.search("<dc:description>([0-9a-f]{64})<", picture.read_text(encoding="utf-8"))
    assert found is not None
    return found.group(1)
