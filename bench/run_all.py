"""Runs every benchmark, prints its table as Markdown and keeps the numbers and the tables in bench/results.

python bench/run_all.py [--device cuda] [--quick] [--name cpu-2026-11-21]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import cell, columns, first_line, setting, verdicts

HERE = Path(__file__).parent


def cpu_model() -> str:
    """Return what the system calls its CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    """Return the commit that is measured; a copy without .git is told by the variable COMMIT."""
    head = os.environ.get("COMMIT") or first_line("git", "rev-parse", "HEAD") or "unknown"
    return head + (" (changed)" if first_line("git", "status", "--porcelain", "-uno") else "")


def markdown(result: dict[str, Any]) -> str:
    """Return one benchmark's rows as a Markdown table, its bounds above and its targets below."""
    names = columns(result["rows"])
    bounds = ", ".join(f"{name} {value:.3g}" for name, value in result["bounds"].items())
    lines = [f"### {result['title']}", "", bounds, ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "-")) for name in names) + " |" for row in result["rows"]]
    targets = verdicts(result["rows"])
    return "\n".join([*lines, "", *(f"* {line}" for line in targets), *([""] if targets else [])])


def run(script: Path, options: list[str], limit: float) -> dict[str, Any] | str:
    """Return what a benchmark measured, or why it did not."""
    command = [sys.executable, str(script), "--json", *options]
    if limit <= 0:
        return "no time was left"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.1f} s"
    if done.returncode:
        return done.stderr.strip()[-2000:] or f"exit status {done.returncode}"
    return dict(json.loads(done.stdout))


def keep(
    folder: Path,
    name: str,
    about: dict[str, Any],
    results: list[dict[str, Any]],
    failed: dict[str, str],
    tables: list[str],
) -> Path:
    """Write <name>.json and <name>.md with what there is so far; return their path without the ending."""
    stem = name or f"{str(about.get('gpu', about['device'])).lower().replace(' ', '-')}-{about['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {**about, "benchmarks": results, **({"failed": failed} if failed else {})}
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    head = "\n".join(f"* {key}: {value}" for key, value in about.items())
    lost = "".join(f"### {op} FAILED\n\n```\n{why}\n```\n" for op, why in failed.items())
    (folder / f"{stem}.md").write_text(f"# {stem}\n\n{head}\n\n" + "\n".join(tables) + lost)
    return folder / stem


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    name: Annotated[str, typer.Option(help="Of the files in the results folder.")] = "",
    folder: Annotated[Path, typer.Option(help="The results folder.")] = HERE / "results",
    only: Annotated[str, typer.Option(help="Ops, with commas between them; default all.")] = "",
    quick: Annotated[bool, typer.Option(help="Fewer problems and repeats; nothing is kept.")] = False,
    tiny: Annotated[bool, typer.Option(help="The GPU's problems cut down; nothing is kept.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds that they may take together.")] = 7200,
) -> None:
    scripts = {script.stem.removeprefix("bench_"): script for script in sorted(HERE.glob("bench_*.py"))}
    wanted = only.split(",") if only else list(scripts)
    if unknown := set(wanted) - set(scripts):
        raise typer.BadParameter(f"no such benchmark: {', '.join(sorted(unknown))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this torch sees no GPU")
    options = ["--device", device, *(["--quick"] if quick else []), *(["--tiny"] if tiny else [])]
    known = setting(device)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "device": device,
    }
    about |= {key: known[key] for key in ("gpu", "torch", "cuda", "driver") if key in known}
    results, failed, tables = [], {}, []
    end = time.monotonic() + limit
    for op in wanted:
        begin = time.monotonic()
        result = run(scripts[op], options, end - begin)
        print(f"{op}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if isinstance(result, str):
            failed[op] = result
            print(f"### {op} FAILED\n\n{result}\n", flush=True)
        else:
            results.append(result)
            tables.append(markdown(result))
            print(tables[-1], flush=True)
        if not (quick or tiny):
            kept = keep(folder, name, about, results, failed, tables)
    met = [line for result in results for line in verdicts(result["rows"])]
    if met:
        missed = sum("MISSED" in line for line in met)
        open_ = sum("not measured" in line for line in met)
        print(f"targets: {len(met) - missed - open_} met, {missed} missed, {open_} not measured")
    if not (quick or tiny):
        print(f"kept in {kept}.json and .md")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
