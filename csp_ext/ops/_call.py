"""How a wrapper calls its op: the raw ops do all checks, the wrapper gives their errors Python's types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._refusal import refusal

# torch's own complaint about an argument that does not fit the schema
_MISFIT = re.compile(
    r"(?P<op>csp::\w+)\(\) Expected a value of type '(?P<want>[^']+)' for argument '(?P<name>\w+)' "
    r"but instead found type '(?P<got>[^']+)'\.(?:\nPosition: \d+\nValue: (?P<value>.*))?"
)
# the op's complaint about what no argument is to blame for: a kernel or a GPU
_MACHINE = re.compile(r"csp::\w+: (kernel|cuda:\d+) ")
_PLAIN = ("bool", "int", "float", "str")  # types whose value is worth showing


def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a raw op; its complaint about an argument becomes a ValueError, about a type a TypeError."""
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        clearer = _clearer(error, op, args, kwargs)
        if clearer is error:
            raise
        raise clearer from None


def _clearer(error: RuntimeError, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception:
    if isinstance(error, NotImplementedError):
        refused = refusal(op.default._schema, args, kwargs)
        return refused if isinstance(refused, TypeError) else error
    message = str(error).split("\nException raised from")[0].split("\nC++ CapturedTraceback")[0]
    if not message.startswith("csp::"):
        return error
    misfit = _MISFIT.match(message)
    if misfit is not None:
        return _misfit(misfit)
    if _MACHINE.match(message):
        return RuntimeError(message)
    if message.endswith("got None"):
        return TypeError(message)
    return (MemoryError if ": out of memory" in message else ValueError)(message)


def _misfit(match: re.Match[str]) -> Exception:
    op, want, name, got = match.group("op", "want", "name", "got")
    optional = want.startswith("Optional[")
    want = want.removeprefix("Optional[").removesuffix("]")
    value = f" {match['value']}" if got in _PLAIN else ""
    if want == got == "int":
        return ValueError(f"{op}: {name} must fit into 64 bits, got{value}")
    got = "None" if got == "NoneType" else got
    return TypeError(f"{op}: {name} must be {want}{' or None' if optional else ''}, got {got}{value}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and log-sum-exps for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise where a tensor is not on the first one's device: a fake must not answer what no kernel would."""
    (first, like), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != like.device:
            raise RuntimeError(
                f"csp::{op}: {name} must be on the device of {first} ({like.device}), got {tensor.device}"
            )
