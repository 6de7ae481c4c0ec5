"""Checks of config fields: every complaint names the field and its value."""

from __future__ import annotations

import math


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of the given strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_real(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is not a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not low <= value <= high or math.isinf(value):
        span = f"lie in [{low}, {high}]" if math.isfinite(high) else f"be finite and at least {low}"
        raise ValueError(f"{name} must {span}, got {value}")


def check_int(name: str, value: object, low: int) -> None:
    """Refuse what is not an int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_size(name: str, value: object, low: int, rules: tuple[str, ...]) -> None:
    """Refuse what is neither a rule's name nor an int of at least `low`."""
    if isinstance(value, str):
        check_choice(name, value, rules)
    else:
        check_int(name, value, low)
