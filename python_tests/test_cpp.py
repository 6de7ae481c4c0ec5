"""The C++ tests: each gtest case is a pytest item. Skips loudly where a library or the build is missing."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# What `make test` builds: the CPU half, again under sanitizers, the CUDA kernels in the SIMT harness
# and, where there is a GPU, on it.
BINARIES = {
    "cpp": "build/cpp/cpp_tests/csp_tests",
    "asan": "build/asan/cpp_tests/csp_tests",
    "simt": "build/cpp/cpp_tests/csp_simt_tests",
    "cuda": "build/cuda/cpp_tests/csp_cuda_tests",
}
if not torch.cuda.is_available():
    del BINARIES["cuda"]
# CSP_CPP_TESTS names others, separated by colons.
if "CSP_CPP_TESTS" in os.environ:
    BINARIES = {"-".join(Path(name).parts[-3:]): name for name in os.environ["CSP_CPP_TESTS"].split(":")}


@functools.cache
def cases(binary: str) -> list[str]:
    path = ROOT / binary
    if not path.is_file():
        return []
    listing = subprocess.run([path, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout
    suite, found = "", []
    for line in listing.splitlines():
        name = line.split("#")[0].rstrip()
        if line.startswith("  "):
            found.append(suite + name.strip())
        elif name.endswith("."):
            suite = name
    return found


@functools.cache
def outcome(binary: str) -> dict[str, tuple[str, str]]:
    """Run the whole binary once; return each case's verdict and output."""
    run = subprocess.run([ROOT / binary, "--gtest_color=no"], capture_output=True, text=True, check=False)
    verdicts: dict[str, tuple[str, str]] = {}
    name, lines = "", []
    for line in run.stdout.splitlines():
        lines.append(line)
        if line.startswith("[ RUN      ]"):
            name, lines = line[13:].strip(), []
        for verdict, mark in (
            ("ok", "[       OK ]"),
            ("failed", "[  FAILED  ]"),
            ("skipped", "[  SKIPPED ]"),
        ):
            if name and line.startswith(mark) and line[13:].startswith(name):
                verdicts[name] = (verdict, "\n".join(lines))
    if run.returncode not in (0, 1):
        verdicts.setdefault(
            name, ("failed", f"exit code {run.returncode}\n" + "\n".join(lines) + run.stderr[-8000:])
        )
    return verdicts


@pytest.mark.parametrize(
    ("binary", "case"),
    [
        pytest.param(binary, case, id=f"{name}-{case or 'not-built'}")
        for name, binary in BINARIES.items()
        for case in cases(binary) or [""]
    ],
)
def test_cpp(binary, case):
    if not case:
        pytest.skip(
            f"THE C++ TESTS WERE NOT BUILT: no {binary}. "
            "apt-get install libgtest-dev libboost-context-dev (Debian), then `make test`"
        )
    verdict, output = outcome(binary).get(case, ("failed", "the binary ended before this case ran"))
    if verdict == "skipped":
        pytest.skip(output.splitlines()[0] if output else case)
    assert verdict == "ok", output
