"""Pruning methods under one interface; ``csp_ext.apply(model, method=...)`` takes a name or an instance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from csp_ext._fields import check_real
from csp_ext.config import CSPConfig
from csp_ext.methods.base import Layer, Method, Selection
from csp_ext.methods.chance import Random
from csp_ext.methods.csp import CSP
from csp_ext.methods.full import Full
from csp_ext.methods.h2o import H2O
from csp_ext.methods.lookm import LookM
from csp_ext.methods.pyramidkv import PyramidKV
from csp_ext.methods.roco import RoCo
from csp_ext.methods.snapkv import SnapKV
from csp_ext.methods.streaming import Streaming


def _csp(**fields: Any) -> CSP:
    return CSP(CSPConfig(**fields))


def _csp_paper(**fields: Any) -> CSP:
    return CSP(CSPConfig.paper().replace(**fields))


def _csp_release(budget: float = 0.2, **fields: Any) -> CSP:
    """Half of the budget goes to the recent tokens, as in the release's scripts."""
    check_real("budget", budget, 0, 2)
    return CSP(CSPConfig.release(hh_ratio=budget / 2, recent_ratio=budget / 2, **fields))


# What suits SnapKV's score best on the evaluation suite (docs/quality.md); its authors' window is 32.
TUNED: dict[str, Any] = {"window": 8, "recent": 8, "pool": "max", "pool_kernel": 7}

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "random": Random,
    "streaming": Streaming,
    "h2o": H2O,
    "roco": RoCo,
    "snapkv": SnapKV,
    "snapkv-release": partial(SnapKV, recent="half", window="half"),
    "snapkv-raw": partial(SnapKV, pool="none"),
    "snapkv-tuned": partial(SnapKV, **TUNED),
    "pyramidkv": PyramidKV,
    "pyramidkv-tuned": partial(PyramidKV, **TUNED),
    "lookm": LookM,
    "lookm-average": partial(LookM, merge="average"),
    "lookm-weighted": partial(LookM, merge="weighted"),
    "lookm-tp": partial(LookM, text_prior="exact"),
    "lookm-tp-release": partial(LookM, text_prior="release"),
    "csp": _csp,
    "csp-calibrated": partial(_csp, combine="calibrated", cross_ratio=0.5),
    "csp-union": partial(_csp, combine="union", cross_ratio=0.5),
    "csp-intersection": partial(_csp, combine="intersection", cross_ratio=0.5),
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
    "LookM",
    "Method",
    "PyramidKV",
    "Random",
    "RoCo",
    "Selection",
    "SnapKV",
    "Streaming",
    "make_method",
]
