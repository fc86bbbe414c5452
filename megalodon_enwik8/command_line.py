"""Command lines whose errors are one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from megalodon_enwik8.errors import UserError


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError, without the usage that argparse prints first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole_number(at_least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `at_least` to what 64 bits hold."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if not at_least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {at_least}")
        return value

    return convert


def number(at_least: float, at_most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in the closed range."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (at_least <= value <= at_most and math.isfinite(value)):
            bounds = f">= {at_least:g}" + (f" and <= {at_most:g}" if at_most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}")
        return value

    return convert
