"""What a user gets from the package: headers, CMake config, stubs, clean symbols, an sdist."""

from __future__ import annotations

import importlib.resources
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import csp_ext
from csp_ext._library import CPU_LIBRARY, find_library

ROOT = Path(__file__).parent.parent
OPS = [
    "n_softmax",
    "segmented_column_sum",
    "score",
    "dual_top_k",
    "select",
    "compact",
    "compact_in_place",
    "prune",
    "prune_in_place",
    "decode",
]

CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
find_package(csp_ext REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE csp::csp_cpu csp::csp_cuda_plan)
"""
CONSUMER_MAIN = """
#include <csp/plan.h>
#include <cstdio>
int main() {
  float logits[2] = {0.0f, 0.0f}, out[2];
  csp::NSoftmaxParams params;
  params.logits = logits;
  params.out = out;
  params.rows = 1;
  params.cols = 2;
  params.n = 2.0;
  csp::n_softmax_cpu(params);
  const csp::Plan plan = csp::plan_n_softmax_cuda(params, csp::CudaDevice());
  std::printf("%.3f %.3f, %d launch", out[0], out[1], static_cast<int>(plan.launches));
}
"""


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """Return (kind, name) of the symbols that nm lists."""
    lines = subprocess.run(
        ["nm", "-C", *flags, path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [(line[17], line[19:]) for line in lines if len(line) > 19]


def test_every_op_has_its_header():
    assert {f"{op}.h" for op in OPS} <= {
        path.name for path in (Path(csp_ext.get_include()) / "csp").iterdir()
    }


def test_headers_need_only_the_standard_library():
    for header in (ROOT / "csrc/include/csp").glob("*.h"):
        source = f'#include "csp/{header.name}"\nint main() {{}}'
        command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c++", "-"]
        run = subprocess.run(
            [*command, "-I", csp_ext.get_include()], input=source, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr


def test_a_cmake_project_finds_and_runs_the_library(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (tmp_path / "main.cpp").write_text(CONSUMER_MAIN)
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    build = tmp_path / "build"
    subprocess.run(
        [cmake, "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={csp_ext.cmake_prefix_path()}"],
        check=True,
        capture_output=True,
    )
    subprocess.run([cmake, "--build", build], check=True, capture_output=True)
    assert (
        subprocess.run([build / "consumer"], capture_output=True, text=True, check=True).stdout
        == "0.250 0.250, 1 launch"
    )


def test_typed_and_stubbed():
    files = importlib.resources.files("csp_ext")
    assert (files / "py.typed").is_file()
    assert (files / "_host.pyi").is_file()


def test_libraries_name_torch_and_export_nothing_of_ours():
    for name, torch_library in (
        ("libcsp_ops_cpu.so", "libtorch_cpu.so"),
        ("libcsp_ops_cuda.so", "libtorch_cuda.so"),
    ):
        path = find_library(name)
        if path is None:
            assert name != "libcsp_ops_cpu.so"
            continue
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert f"[{torch_library}]" in dynamic
        assert "libcudart" not in dynamic
        assert "RUNPATH" not in dynamic
        assert not [
            symbol for _, symbol in symbols(path, "-D", "--defined-only") if symbol.startswith("csp::")
        ]


def test_no_build_path_is_in_the_libraries():
    assert str(ROOT).encode() not in CPU_LIBRARY.read_bytes()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_objects_of_an_instruction_set_share_no_symbol(isa):
    """An inline function compiled for AVX-512 must never become the linker's one copy for everybody."""
    objects = list((ROOT / f"build/cpp/csrc/cpu/CMakeFiles/csp_cpu_{isa}.dir").glob("*.o"))
    if not objects:
        pytest.skip("the C++ preset `cpp` was not built: run `make test`")
    for path in objects:
        foreign = [
            name
            for kind, name in symbols(path, "--defined-only")
            if kind in "WVu" and f"csp::{isa}::" not in name
        ]
        assert not foreign, f"{path.name}: {foreign}"


def test_sdist_holds_what_a_build_needs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "csp_ext", "cmake", "tools", "cpp_tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {name for name in tracked if (ROOT / name).exists()} <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= names
