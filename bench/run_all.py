"""Runs every benchmark, prints its table as Markdown and keeps the numbers in bench/results/<name>.json.

python bench/run_all.py [--quick] [--name cpu-2026-11-21]
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

HERE = Path(__file__).parent


def cpu_model() -> str:
    """Return what the system calls its CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def markdown(result: dict[str, Any]) -> str:
    """Return one benchmark's rows as a Markdown table."""
    columns = list(result["rows"][0])
    lines = [f"### {result['title']}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    name: Annotated[str, typer.Option(help="Of the file in bench/results.")] = "",
    quick: Annotated[bool, typer.Option(help="Fewer shapes and repeats; nothing is kept.")] = False,
) -> None:
    results = []
    for script in track(sorted(HERE.glob("bench_*.py")), description="benchmarks"):
        command = [sys.executable, str(script), "--json", *(["--quick"] if quick else [])]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(markdown(results[-1]))
    if quick:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    day = datetime.date.today().isoformat()
    kept = {"date": day, "commit": commit.stdout.strip(), "cpu": cpu_model(), "benchmarks": results}
    target = HERE / "results" / f"{name or 'cpu-' + day}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept in {target}")


if __name__ == "__main__":
    typer.run(main)
