"""Shared by the benchmarks: options, the machine's bounds, rows that stand beside them, and one table."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clock import Clock, CpuClock, CudaClock, Side, Timing, interleave
from rich.console import Console
from rich.table import Table

import csp_ext

Row = dict[str, Any]


def arguments(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the first problems, few repeats")
    parser.add_argument(
        "--tiny", action="store_true", help="the GPU's problems cut down, to try the script out"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    return options


# ---- what the machine can do ----


@dataclass(frozen=True)
class Bounds:
    """Best rates seen here: bytes a second copied (read + written) and read, and matrix FLOP a second."""

    copy: float
    read: float
    matrix: float


def measure_bounds(device: str, clock: Clock, tiny: bool = False) -> Bounds:
    """Measure copying and reading a buffer far larger than the caches, and a square matrix product."""
    cuda = device == "cuda"
    elements = (1 << 16) if tiny else (256 << 20 if cuda else 64 << 20)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    size = 64 if tiny else (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    times = interleave(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
            "matrix": lambda: torch.matmul(a, b, out=product),
        },
        repeats=15,
        clock=clock,
    )
    moved = source.numel() * source.element_size()
    return Bounds(2 * moved / times["copy"].low, moved / times["read"].low, 2 * size**3 / times["matrix"].low)


def first_line(*command: str) -> str:
    """Return the first line that a command prints; nothing where it fails or is not there."""
    if not shutil.which(command[0]):
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else ""


def setting(device: str) -> dict[str, object]:
    """Return what a result depends on: device and versions."""
    about: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties: Any = torch.cuda.get_device_properties(0)
        about["gpu"] = properties.name
        about["multiprocessors"] = properties.multi_processor_count
        about["cuda"] = torch.version.cuda
        about["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**about, **csp_ext.build_info()}


# ---- what is wanted ----


@dataclass(frozen=True)
class Measured:
    """What a target is checked against."""

    times: dict[str, Timing]
    moved: int
    flops: int
    bounds: Bounds

    def share(self, peer: str) -> float:
        """Return how many times longer a side takes."""
        return self.times[peer].median / self.times["csp"].median


@dataclass(frozen=True)
class Target:
    """A line that a row is to reach: `value` of what was measured at least, or at most, `line`."""

    text: str
    value: Callable[[Measured], float]
    line: float
    least: bool = True
    show: str = ".2f"
    peer: str = "csp"  # left open where this side was not measured

    def verdict(self, measured: Measured) -> str:
        """Return the line with its outcome."""
        sign = ">=" if self.least else "<="
        text = f"{self.text} {sign} {self.line:{self.show}}"
        if self.peer not in measured.times:
            return f"{text}: not measured"
        value = self.value(measured)
        met = value >= self.line if self.least else value <= self.line
        return f"{text}: {'met' if met else 'MISSED'}, {value:{self.show}}"


def at_most(us: float) -> Target:
    """Take at most so many microseconds."""
    return Target("us", lambda m: m.times["csp"].median * 1e6, us, least=False, show=".1f")


def copy_share(share: float) -> Target:
    """Move the bytes at this share of the copy bandwidth."""
    return Target(
        "of copy bandwidth", lambda m: m.moved / m.times["csp"].median / m.bounds.copy, share, show=".0%"
    )


def matrix_share(share: float, passes: int) -> Target:
    """Multiply at this share of the matrix rate; the product is computed `passes` times."""
    return Target(
        "of matrix rate",
        lambda m: passes * m.flops / m.times["csp"].median / m.bounds.matrix,
        share,
        show=".0%",
    )


def faster_than(peer: str, factor: float = 1) -> Target:
    """Be so many times faster than a peer."""
    return Target(f"{peer} / csp", lambda m: m.share(peer), factor, peer=peer)


def variant_share(variant: str, share: float) -> Target:
    """A variant of the same op takes at most this share of the time."""
    return Target(
        f"time with {variant}", lambda m: m.share(variant), share, least=False, show=".0%", peer=variant
    )


# ---- the table ----


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Bench:
    """One benchmark: measures sides and gathers rows.

    A row has the median of every side, how many times longer than ours each peer takes ("peer / csp"), the
    bytes and operations that the planner counts, and the share of the machine's bound that is reached.
    """

    title: str
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.device: str = self.options.device
        self.for_gpu: bool = self.device == "cuda" or self.options.tiny
        self.clock: Clock = CudaClock() if self.device == "cuda" else CpuClock()
        self.bounds = measure_bounds(self.device, self.clock, self.options.tiny)

    @property
    def repeats(self) -> int:
        """Samples of each side."""
        if self.options.tiny or self.options.quick:
            return 3 if self.options.tiny else 5
        return 31 if self.device == "cuda" else 21

    def few(self, problems: Sequence[Any]) -> list[Any]:
        """Return the problems to measure: all, the first few, or all of them cut down."""
        if self.options.tiny:
            return list(dict.fromkeys(problem.tiny() for problem in problems))
        return list(problems[:2] if self.options.quick else problems)

    def plan(self, op: str, **shape: Any) -> dict[str, int]:
        """Return what the planner says of a problem: its bytes and operations are those of any device."""
        if self.device == "cuda":
            return dict(csp_ext.plan(op, device="cuda", **csp_ext.cuda_device(), **shape))
        if op in ("n_softmax", "segmented_column_sum", "dual_top_k"):
            return dict(csp_ext.plan(op, device="cuda", **shape)) | {"workspace_bytes": 0}
        return dict(csp_ext.plan(op, num_threads=torch.get_num_threads(), **shape))

    def row(
        self,
        case: str,
        ours: Side,
        peers: dict[str, Side],
        plan: dict[str, int],
        *,
        variants: dict[str, Side] | None = None,
        targets: Sequence[Target] = (),
        memory: bool = False,
    ) -> None:
        """Measure one problem, our side, its `variants` and the peers in turn; `memory`: what each takes."""
        clock, unit, scale = self.clock, self.clock.unit, self.clock.scale
        variants = variants or {}
        times = interleave({"csp": ours, **variants, **peers}, self.repeats, clock)
        mine = times["csp"].median
        moved = plan["bytes_read"] + plan["bytes_written"]
        by_copy, by_matrix = moved / self.bounds.copy, plan["flops"] / self.bounds.matrix
        row: Row = {"case": case, f"csp {unit}": mine * scale}
        for name in variants:
            row[f"{name} {unit}"] = times[name].median * scale
        for name in peers:
            known = name in times
            row[f"{name} {unit}"] = times[name].median * scale if known else "out of memory"
            row[f"{name} / csp"] = times[name].median / mine if known else "-"
        if isinstance(clock, CudaClock):
            graph = clock.graph(ours)
            row["in a graph us"] = graph * scale if graph else "not captured"
            row["from Python us"] = clock.issue(ours) * scale
            row["launches"] = plan["launches"]
        row["MB"] = moved / 1e6
        row["GFLOP"] = plan["flops"] / 1e9
        row["scratch MiB"] = plan["workspace_bytes"] / 2**20
        if memory:
            for name, side in {"csp": ours, **variants, **peers}.items():
                row[f"{name} new MiB"] = clock.new_bytes(side) / 2**20
        row["bound"] = "copy" if by_copy >= by_matrix else "matrix"
        row[f"bound {unit}"] = max(by_copy, by_matrix) * scale
        row["of bound"] = max(by_copy, by_matrix) / mine
        if self.for_gpu:
            measured = Measured(times, moved, plan["flops"], self.bounds)
            row["targets"] = [target.verdict(measured) for target in targets]
        self.rows.append(row)

    def report(self) -> None:
        """Print the rows as a table, or as JSON with versions and bounds beside them."""
        about = setting(self.device)
        result = {
            "title": self.title,
            "device": self.device,
            "cpu": csp_ext.cpu_capability(),
            "build": about,
            "bounds": {
                "copy GB/s": self.bounds.copy / 1e9,
                "read GB/s": self.bounds.read / 1e9,
                f"{'bfloat16' if self.device == 'cuda' else 'float32'} matrix TFLOP/s": self.bounds.matrix
                / 1e12,
            },
            "rows": self.rows,
        }
        if self.options.json:
            print(json.dumps(result))
            return
        machine = about.get("gpu", f"{about['threads']} threads, {csp_ext.cpu_capability()}")
        bounds = ", ".join(f"{name} {value:.3g}" for name, value in result["bounds"].items())
        table = Table(title=f"{self.title}  (torch {torch.__version__}, {machine}; {bounds})")
        names = columns(self.rows)
        for column in names:
            table.add_column(column, justify="left" if column == "case" else "right")
        for row in self.rows:
            table.add_row(*(cell(row.get(column, "-")) for column in names))
        console = Console(width=220 if self.for_gpu else 160)
        console.print(table)
        for line in verdicts(self.rows):
            console.print(line, highlight=False)


def columns(rows: list[Row]) -> list[str]:
    """Return the columns of a table: those of any row but the targets, and but zeros, new memory aside."""
    names = dict.fromkeys(name for row in rows for name in row if name != "targets")
    says = {name: any(row.get(name, "-") not in (0, "-") for row in rows) for name in names}
    return [name for name in names if says[name] or name.endswith("new MiB")]


def cell(value: object) -> str:
    """Return a number with three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def verdicts(rows: list[Row]) -> list[str]:
    """Return one line for each target of each row."""
    return [f"{row['case']}: {verdict}" for row in rows for verdict in row.get("targets", [])]
