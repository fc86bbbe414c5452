"""The library's version, and whether torch and transformers are of those it was tested with."""

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

__version__ = "0.1.0"  # pyproject.toml reads it here

DISTRIBUTION = "megalodon-enwik8"  # whose pyproject.toml states the ranges


def warn_of_untested_versions() -> None:
    """Warn, in one line each, of versions outside the ranges that pip would have kept to."""
    try:
        ranges = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # files that were copied: nothing states the ranges
        return
    for wanted in ranges:
        if wanted.name not in ("torch", "transformers"):
            continue
        installed = version(wanted.name)
        if not wanted.specifier.contains(installed, prereleases=True):
            warnings.warn(
                f"{wanted.name} {installed} is installed, megalodon was tested with "
                f'{wanted.specifier}: pip install "{wanted}"',
                stacklevel=3,
            )
