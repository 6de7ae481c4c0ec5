"""Loads a local checkpoint; nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from csp_ext.demo.console import UserError, first_line

DTYPES = ("auto", "float32", "float16", "bfloat16")


def device_of(name: str) -> torch.device:
    """Return the device of a name; "auto" is the GPU where the pruning kernels run on one."""
    from csp_ext.dispatch import missing_kernels

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not missing_kernels("cuda") else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs for torch")
    return device


def check_folder(folder: Path) -> None:
    """Check that a folder looks like a saved model."""
    if not folder.is_dir():
        raise UserError(f"model {folder} is not a folder; a checkpoint must be on this machine")
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder} is not a checkpoint folder: it has no config.json")


def load(folder: Path, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """Return the model, in evaluation mode, and its processor.

    Raises
    ------
    UserError
        If the folder holds no vision-language model with its processor.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    check_folder(folder)
    # Damaged files surface as whatever their reader raises: OSError, KeyError, SafetensorError, ...
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"model {folder}: its processor cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        kind = type(processor).__name__
        raise UserError(f"model {folder} has no processor for images and text, only a {kind}")
    try:
        result: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"model {folder} cannot be loaded: {first_line(error)}") from error
    model, loaded = result
    # transformers would fill them with random numbers.
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"model {folder} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.to(device).eval(), processor
