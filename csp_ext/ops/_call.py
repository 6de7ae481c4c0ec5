"""How a wrapper calls its op: the raw ops do all checks, the wrapper gives their errors Python's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a raw op; its complaint about an argument becomes a ValueError, a wrong type a TypeError."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        message = str(error).split("\nException raised from")[0].split("\nC++ CapturedTraceback")[0]
        if message.startswith("csp::") and "Expected a value of type" in message:
            raise TypeError(message) from None
        if message.startswith("csp::"):
            raise ValueError(message) from None
        raise


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and log-sum-exps for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
