"""Types for argparse: what a flag's text may be, and the error that says so."""

import argparse
import math
from collections.abc import Callable

from ..config import parse_rate


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if len(text) > 20 or not text.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"not a whole number: {text!r}")
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is too small, the least is {least}" if int(text) < least else "too large")
        return int(text)

    return parse


def top_k(text: str) -> int | None:
    """A type for argparse: how many tokens to keep. 0 and -1 are how other programs say: all."""
    return None if text in ("0", "-1") else whole(1)(text)


def number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number for which `holds` is true. `rule` says that in words."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
        if not holds(value):  # NaN holds nowhere
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return value

    return parse


def rate(flag: str) -> Callable[[str], float]:
    """A type for argparse: bytes per second."""
    return lambda text: parse_rate(text, flag=flag)


def flops(text: str) -> float:
    """A type for argparse: operations per second, 90TFLOP/s or a plain number."""
    scale = {"T": 1e12, "G": 1e9, "P": 1e15}
    digits = text.removesuffix("FLOP/s").removesuffix("FLOPS")
    value = number("positive and finite", lambda value: 0 < value < math.inf)
    return value(digits[:-1]) * scale[digits[-1]] if digits[-1:] in scale else value(digits)


temperature = number("0 (greedy) or positive and finite", lambda value: 0 <= value < math.inf)
seconds = number("a number of seconds from 0 to a day", lambda value: 0 <= value <= 86400)
positive = number("positive and finite", lambda value: 0 < value < math.inf)
probability = number("in (0, 1]", lambda value: 0 < value <= 1)


def percent(text: str) -> float:
    """5% -> 0.05."""
    return number("a percentage such as 5%", lambda value: 0 <= value < 1000)(text.removesuffix("%")) / 100
