"""What a prune kept and freed, layer by layer."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from csp_ext.integration.modality import IMAGE, TEXT


@dataclass
class LayerStats:
    """One layer of the last prompt.

    Nothing is read from the device before it is asked for: collecting it costs generation no synchronisation.

    Attributes
    ----------
    layer : int
        Index of the decoder layer.
    bytes_before, bytes_after : int
        Size of the stored keys and values of the prompt, read off the tensors.
    """

    layer: int
    bytes_before: int
    bytes_after: int
    _modality: Tensor  # [B, L] int8, -1 padding
    _indices: Tensor | None  # [B, Hs, T] int32, -1 free; None where the layer was left whole

    @property
    def indices(self) -> Tensor:
        """Prompt positions kept, int32 [B, Hs, T] on the CPU, ascending, free slots -1 at the left."""
        if self._indices is None:
            real = self._modality.cpu() >= 0
            positions = torch.arange(real.shape[1], dtype=torch.int32)
            return torch.where(real, positions, -1)[:, None]
        return self._indices.cpu()

    @property
    def lengths(self) -> Tensor:
        """Tokens kept per row and head, int64 [B, Hs] on the CPU."""
        return (self.indices >= 0).sum(-1)

    @property
    def kept(self) -> float:
        """Tokens kept: the mean over rows and heads."""
        return float(self.lengths.double().mean())

    @property
    def dropped(self) -> float:
        """Real tokens dropped: the mean over rows and heads."""
        return float((self._modality.cpu() >= 0).sum(-1).double().mean()) - self.kept

    def share_kept(self, modality: int) -> float | None:
        """Return the share of the prompt's tokens of one modality that was kept; None where it has none."""
        of_modality = self._modality.cpu() == modality
        indices = self.indices
        total = int(of_modality.sum()) * indices.shape[1]
        if total == 0:
            return None
        rows = of_modality[:, None].expand(-1, indices.shape[1], -1)
        hits = rows.gather(-1, indices.clamp_min(0).long()) & (indices >= 0)
        return float(hits.sum()) / total

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return {
            "layer": self.layer,
            "kept": self.kept,
            "dropped": self.dropped,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "text_kept": self.share_kept(TEXT),
            "image_kept": self.share_kept(IMAGE),
        }


@dataclass
class PruneStats:
    """What was kept of the last prompt: one :class:`LayerStats` per prunable layer, and their sums.

    ``print(stats)`` shows a table; in a rich console the object renders as one.

    Attributes
    ----------
    renewals : int
        How often the cache has been pruned again since (``CSPConfig.decode_interval``).
    """

    layers: list[LayerStats] = field(default_factory=list)
    renewals: int = 0

    @property
    def bytes_before(self) -> int:
        """Size of the prompt's keys and values before pruning, over the layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Size of the prompt's keys and values after pruning, over the layers."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "renewals": self.renewals,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __rich__(self) -> Table:
        saved = 1 - self.bytes_after / self.bytes_before if self.bytes_before else 0.0
        title = f"KV cache: {_size(self.bytes_before)} -> {_size(self.bytes_after)} ({saved:.0%} freed)"
        if self.renewals:
            title += f", pruned again {self.renewals} times"
        table = Table(title=title)
        for name in ("layer", "kept", "dropped", "text kept", "image kept", "before", "after"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            row = layer.to_dict()
            table.add_row(
                str(layer.layer),
                f"{row['kept']:.0f}",
                f"{row['dropped']:.0f}",
                _share(row["text_kept"]),
                _share(row["image_kept"]),
                _size(layer.bytes_before),
                _size(layer.bytes_after),
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue().rstrip()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
