"""Pruning methods under one interface; ``csp_ext.apply(model, method=...)`` takes a name or an instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from csp_ext.config import CSPConfig
from csp_ext.methods.base import Layer, Method, Selection
from csp_ext.methods.chance import Random
from csp_ext.methods.csp import CSP
from csp_ext.methods.full import Full
from csp_ext.methods.h2o import H2O
from csp_ext.methods.snapkv import SnapKV
from csp_ext.methods.streaming import Streaming


def _csp(**fields: Any) -> CSP:
    return CSP(CSPConfig(**fields))


def _csp_paper(**fields: Any) -> CSP:
    return CSP(CSPConfig.paper().replace(**fields))


def _csp_release(budget: float = 0.2, **fields: Any) -> CSP:
    """Half of the budget goes to the recent tokens, as in the release's scripts."""
    return CSP(CSPConfig.release(hh_ratio=budget / 2, recent_ratio=budget / 2, **fields))


METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "random": Random,
    "streaming": Streaming,
    "h2o": H2O,
    "snapkv": SnapKV,
    "csp": _csp,
    "csp-paper": _csp_paper,
    "csp-release": _csp_release,
}


def make_method(name: str, **fields: Any) -> Method:
    """Make a method by its name.

    Parameters
    ----------
    name : str
        Key of ``METHODS``.
    **fields
        Of the method, e.g. ``budget=0.2``; all methods have a budget.

    Raises
    ------
    TypeError, ValueError
        If there is no such method, or a field is unknown or wrong.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](**fields)


__all__ = [
    "CSP",
    "H2O",
    "METHODS",
    "Full",
    "Layer",
    "Method",
    "Random",
    "Selection",
    "SnapKV",
    "Streaming",
    "make_method",
]
