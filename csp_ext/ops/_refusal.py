"""What an op answers where no kernel takes its tensors: which they are, and how to get one for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext._library import cuda_status

OPS = (
    "n_softmax",
    "segmented_column_sum",
    "score",
    "dual_top_k",
    "select",
    "compact",
    "compact_",
    "prune",
    "prune_",
    "decode",
)


def refusal(
    schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TypeError | NotImplementedError:
    """Return the error for arguments that no kernel takes: by type where that is wrong, else by device."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not tensors:
        return TypeError(f"{schema.name}: {schema.arguments[0].name} must be Tensor, got None")
    for name, tensor in tensors.items():
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        if kind != "torch.strided":
            return TypeError(f"{schema.name}: {name} must be a plain strided tensor, got a {kind} one")
    return NotImplementedError(no_kernel(schema.name, {str(tensor.device) for tensor in tensors.values()}))


def no_kernel(op: str, devices: set[str]) -> str:
    """Say that an op has no kernel for tensors on `devices`, and why not where that is CUDA."""
    message = f"{op}: there is no kernel for tensors on {' and '.join(sorted(devices))}"
    status = cuda_status()
    if not status.loaded and any(device.startswith("cuda") for device in devices):
        message += f": {status.reason}"
    return message


def _refuse(op: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        schema = getattr(torch.ops.csp, op).default._schema
        raise NotImplementedError(str(refusal(schema, args, kwargs)))

    return refuse


# Every backend without a kernel of its own gets this one. The dispatcher tells the two apart, so
# csp_ext.dispatch.has_kernel still answers no.
_LIBRARY = torch.library.Library("csp", "IMPL")
for _op in OPS:
    _LIBRARY.impl(_op, _refuse(_op), "CompositeExplicitAutograd")
