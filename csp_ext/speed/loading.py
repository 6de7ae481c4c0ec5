"""The model to measure: of a known shape with random weights, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from csp_ext.demo import checkpoint
from csp_ext.demo.console import UserError, first_line
from csp_ext.speed.shapes import QUICK, SHAPES, fill, parameter_bytes, skeleton


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes
    ----------
    name : str
        In tables.
    config : LlavaConfig
        Its sizes.
    dtype : torch.dtype
        Of the parameters.
    device : torch.device
        Where it goes.
    folder : Path or None
        Of a checkpoint; None: random weights.
    """

    name: str
    config: Any
    dtype: torch.dtype
    device: torch.device
    folder: Path | None

    @property
    def bytes(self) -> int:
        """Size of the parameters."""
        return parameter_bytes(skeleton(self.config, self.dtype))

    def load(self) -> Any:
        """Return the model on its device, in evaluation mode."""
        if self.folder is not None:
            return checkpoint.load(self.folder, self.device, str(self.dtype).removeprefix("torch."))[0]
        model = skeleton(self.config, self.dtype)
        fill(model, self.device)
        return model


def find(name: str, device: torch.device, dtype: str) -> Source:
    """Return the source of a name: a shape, or the folder of a LLaVA checkpoint.

    Parameters
    ----------
    name : str
        What the user wrote.
    device : torch.device
        Where the model goes.
    dtype : str
        "auto": a checkpoint's own; else bfloat16 on a GPU, float32 on a CPU.

    Raises
    ------
    UserError
        If there is no such model.
    """
    shapes = {**SHAPES, "quick": QUICK}
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name in shapes:
        chosen = usual if dtype == "auto" else getattr(torch, dtype)
        return Source(name, shapes[name].config(), chosen, device, None)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"model must be one of {', '.join(SHAPES)} or a folder, got {name!r}")
    checkpoint.check_folder(folder)
    from transformers import AutoConfig, LlavaConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"model {folder} cannot be read: {first_line(error)}") from error
    if not isinstance(config, LlavaConfig):
        raise UserError(
            f"model {folder} is a {type(config).__name__}; csp bench makes prompts for LLaVA only"
        )
    chosen = (getattr(config, "dtype", None) or usual) if dtype == "auto" else getattr(torch, dtype)
    return Source(folder.resolve().name, config, chosen, device, folder)
