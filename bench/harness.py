"""Shared by the benchmarks: interleaved timing, medians, the machine's bounds, and one table."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

import csp_ext


@dataclass
class Timing:
    """Median, minimum and maximum of one side, in seconds."""

    median: float
    low: float
    high: float


def interleave(sides: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, Timing]:
    """Time every side in turn, round after round, so that a noisy neighbour hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            samples[name].append(time.perf_counter() - begin)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def copy_bandwidth() -> float:
    """Return the bytes per second (read + written) of a plain copy of 256 MiB."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    time_s = interleave({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].low
    return 2 * source.numel() * 4 / time_s


def read_bandwidth() -> float:
    """Return the bytes per second that a sum over 256 MiB reads."""
    source = torch.ones(64 << 20)
    return source.numel() * 4 / interleave({"read": lambda: source.sum()}, repeats=7)["read"].low


def flops() -> float:
    """Return the best float32 matrix rate seen here, in FLOP/s."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    return 2 * 1024**3 / interleave({"mm": lambda: torch.matmul(a, b, out=out)}, repeats=15)["mm"].low


def arguments(description: str | None) -> argparse.Namespace:
    """Return the options that every benchmark has: `quick` and `json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes or repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def report(title: str, rows: list[dict[str, object]], as_json: bool) -> None:
    """Print rows as a table, or as JSON with the versions beside them."""
    if as_json:
        meta = {"torch": torch.__version__, "threads": torch.get_num_threads(), **csp_ext.build_info()}
        print(json.dumps({"title": title, "cpu": csp_ext.cpu_capability(), "build": meta, "rows": rows}))
        return
    setting = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {csp_ext.cpu_capability()}"
    table = Table(title=f"{title}  ({setting})")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)
