"""What ptxas says of every CUDA kernel of a build: registers, shared memory, spills. Needs no GPU.

python tools/cuda_resources.py [BUILD_DIR] [--json FILE] [--check]

The build keeps ptxas's words beside each object file (tools/ptxas_log.sh). `--check` fails where a kernel
spills or has a stack frame, and where a .cu file was not compiled for each of `--archs`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

# Kernels that may use local memory: the start of a name, and the reason.
ALLOWED: dict[str, str] = {}

# Warps that a multiprocessor holds; 64 where not named.
WARPS = {"sm_75": 32, "sm_86": 48, "sm_89": 48, "sm_120": 48}

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; stack and spills with those of the functions that it calls."""

    name: str
    arch: str
    source: str = ""
    registers: int = 0
    shared_bytes: int = 0  # static: what a launch adds is not known here
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0

    @property
    def local(self) -> bool:
        """Whether it uses local memory."""
        return self.stack_bytes + self.spill_store_bytes + self.spill_load_bytes > 0

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor that its registers leave room for.

        Each of four parts has 512 registers per lane, which warps take in eights.
        """
        return min(WARPS.get(self.arch, 64), 4 * (512 // (-(-max(1, self.registers) // 8) * 8)))


def parse(text: str, source: str = "") -> list[Kernel]:
    """Return the kernels that the output of `ptxas -v` speaks of, names as they are mangled."""
    found: list[Kernel] = []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            found.append(Kernel(match[1], match[2], source))
        elif not found:
            continue
        elif match := MEMORY.search(line):
            last, (stack, stores, loads) = found[-1], map(int, match.groups())
            found[-1] = replace(
                last,
                stack_bytes=last.stack_bytes + stack,
                spill_store_bytes=last.spill_store_bytes + stores,
                spill_load_bytes=last.spill_load_bytes + loads,
            )
        elif match := USED.search(line):
            shared = SHARED.search(line)
            found[-1] = replace(
                found[-1], registers=int(match[1]), shared_bytes=int(shared[1]) if shared else 0
            )
    return found


def short(name: str) -> str:
    """Return a demangled kernel's name and template arguments, without namespaces and parameters."""
    plain = re.sub(r"(\(anonymous namespace\)|\w+)::", "", name.removeprefix("void "))
    depth = 0
    for place, letter in enumerate(plain):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            plain = plain[:place]
            break
    return plain.replace("__nv_bfloat16", "bf16").replace("__half", "half")


def demangled(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels with readable names, as far as c++filt knows them."""
    kernels = list(kernels)
    if kernels and shutil.which("c++filt"):
        names = "\n".join(kernel.name for kernel in kernels)
        lines = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
        kernels = [
            replace(kernel, name=short(name))
            for kernel, name in zip(kernels, lines.split("\n"), strict=False)
        ]
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.name, kernel.arch))


@dataclass
class Report:
    """The kernels of a build, and its .cu files that left no log."""

    kernels: list[Kernel]
    missing: list[str] = field(default_factory=list)

    def faults(self, archs: Iterable[str] = ()) -> list[str]:
        """Say what is wrong, line by line."""
        said = [f"{source} was compiled without a log: build it again" for source in self.missing]
        for source in sorted({kernel.source for kernel in self.kernels}):
            present = {kernel.arch for kernel in self.kernels if kernel.source == source}
            said += [f"{source} was not compiled for {arch}" for arch in archs if arch not in present]
        for kernel in self.kernels:
            if kernel.local and not any(kernel.name.startswith(name) for name in ALLOWED):
                said.append(
                    f"{kernel.name} of {kernel.source} uses local memory on {kernel.arch}: "
                    f"{kernel.stack_bytes} bytes of stack, {kernel.spill_store_bytes} spilled, "
                    f"{kernel.spill_load_bytes} loaded back"
                )
        return said


def read(build: Path) -> Report:
    """Read the logs of every .cu file that the build compiles."""
    commands = json.loads((build / "compile_commands.json").read_text())
    kernels, missing = [], []
    for command in commands:
        source = Path(command["file"])
        if source.suffix != ".cu" or " -x cu " not in command["command"]:
            continue
        log = Path(command["directory"]) / f"{command['output']}.ptxas"
        if log.is_file():
            kernels += parse(log.read_text(), source.name)
        else:
            missing.append(source.name)
    return Report(demangled(kernels), missing)


def find_build(name: str = "*") -> Path | None:
    """Return the newest build folder of this checkout, of those named so, that compiled CUDA."""
    logs = list(ROOT.glob(f"build/{name}/csrc/cuda/CMakeFiles/csp_cuda.dir/*.ptxas"))
    return max(logs, key=lambda log: log.stat().st_mtime).parents[4] if logs else None


def table(report: Report) -> Table:
    """Return the table: a row per kernel and architecture."""
    shown = Table(title="CUDA kernels by ptxas")
    for column in ("file", "kernel", "arch"):
        shown.add_column(column)
    for column in ("registers", "warps / SM", "shared B", "stack B", "spills B"):
        shown.add_column(column, justify="right")
    for number, kernel in enumerate(report.kernels):
        before = report.kernels[number - 1] if number else None
        if before and before.source != kernel.source:
            shown.add_section()
        shown.add_row(
            "" if before and before.source == kernel.source else kernel.source,
            "" if before and (before.source, before.name) == (kernel.source, kernel.name) else kernel.name,
            kernel.arch,
            *map(str, (kernel.registers, kernel.warps, kernel.shared_bytes, kernel.stack_bytes)),
            f"{kernel.spill_store_bytes} / {kernel.spill_load_bytes}",
            style="red" if kernel.local else None,
        )
    return shown


def main(
    build_dir: Annotated[Path | None, typer.Argument(help="Default: the newest below build/.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 where a kernel uses local memory.")] = False,
    archs: Annotated[
        str, typer.Option(help="What each file must be compiled for, with --check.")
    ] = "sm_80,sm_90",
) -> None:
    build = build_dir or find_build()
    report = read(build) if build else Report([])
    if not report.kernels and not report.missing:
        print(f"no CUDA kernel was compiled in {build or 'any folder of build/'}")
        raise typer.Exit(1)
    Console(width=160).print(table(report))
    print("warps / SM: as many as the registers allow. shared: static; a launch may add to it.")
    if json_file:
        json_file.write_text(json.dumps([asdict(kernel) for kernel in report.kernels], indent=1) + "\n")
    if check:
        faults = report.faults(archs.split(",") if archs else [])
        print("\n".join(faults) or "no kernel uses local memory")
        if faults:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
