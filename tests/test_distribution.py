"""What is handed out says of itself the same everywhere."""

from importlib import metadata
from pathlib import Path

import yaml

import megalodon

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_wherever_it_stands():
    version = megalodon.__version__
    assert metadata.version("megalodon-enwik8") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert next(line for line in changes if line.startswith("## ")) == f"## {version}"
