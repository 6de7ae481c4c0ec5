"""The C++ tests: each gtest case is a pytest item. Skips loudly where GoogleTest or the build is missing."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# `make test` builds both; CSP_CPP_TESTS names others, separated by colons.
BINARIES = os.environ.get(
    "CSP_CPP_TESTS", "build/cpp/cpp_tests/csp_tests:build/asan/cpp_tests/csp_tests"
).split(":")


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
    [pytest.param(b, c, id=f"{Path(b).parts[-3]}-{c}") for b in BINARIES for c in cases(b)]
    or [pytest.param("", "", id="not-built")],
)
def test_cpp(binary, case):
    if not binary:
        pytest.skip("THE C++ TESTS WERE NOT BUILT: apt-get install libgtest-dev (Debian), then `make test`")
    verdict, output = outcome(binary).get(case, ("failed", "the binary ended before this case ran"))
    if verdict == "skipped":
        pytest.skip(output.splitlines()[0] if output else case)
    assert verdict == "ok", output
