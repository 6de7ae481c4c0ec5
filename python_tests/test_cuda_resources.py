"""The table of what each CUDA kernel takes: the parser, and no kernel of ours spills."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import csp_ext
from tools.cuda_resources import Kernel, Report, demangled, find_build, parse, read, short

ROOT = Path(__file__).parent.parent
SOFTMAX = "_ZN3csp45_GLOBAL__N__bccb679c_12_n_softmax_cu_c67ecc1a16n_softmax_kernelI6__halfEEvPKvPvllf"

# As nvcc 13.0 writes it: a kernel for two architectures, then one that spills and calls another function.
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SOFTMAX}' for 'sm_80'
ptxas info    : Function properties for {SOFTMAX}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem, 388 bytes cmem[0]
ptxas info    : Compile time = 93.024 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SOFTMAX}' for 'sm_90'
ptxas info    : Function properties for {SOFTMAX}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compile time = 90.620 ms
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 392 bytes cmem[0], 16 bytes cmem[2]
"""


def test_parse():
    first, second, slow = parse(PTXAS, "a.cu")
    assert first == Kernel(SOFTMAX, "sm_80", "a.cu", registers=40, shared_bytes=32)
    assert second == Kernel(SOFTMAX, "sm_90", "a.cu", registers=41, shared_bytes=32)
    assert slow == Kernel("_Z4slowPf", "sm_90", "a.cu", 255, 0, 32, 20, 16)
    assert [kernel.local for kernel in (first, second, slow)] == [False, False, True]


@pytest.mark.parametrize(
    ("registers", "arch", "warps"),
    [(32, "sm_90", 64), (40, "sm_90", 48), (128, "sm_80", 16), (255, "sm_90", 8), (16, "sm_75", 32)],
)
def test_warps(registers, arch, warps):
    assert Kernel("k", arch, registers=registers).warps == warps


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("void csp::(anonymous namespace)::f<__half>(void const*, long)", "f<half>"),
        (
            "void csp::g<float, csp::(anonymous namespace)::Tile<(int)64>, true>(csp::Args)",
            "g<float, Tile<(int)64>, true>",
        ),
        ("csp::plain(float*)", "plain"),
        ("_Z9unmangled", "_Z9unmangled"),
    ],
)
def test_short_names(name, wanted):
    assert short(name) == wanted


@pytest.mark.skipif(not shutil.which("c++filt"), reason="c++filt is not installed")
def test_demangled():
    assert [kernel.name for kernel in demangled(parse(PTXAS))] == [
        "n_softmax_kernel<half>",
        "n_softmax_kernel<half>",
        "slow",
    ]


def test_faults():
    report = Report(parse(PTXAS, "a.cu"), missing=["b.cu"])
    unbuilt, local = report.faults(["sm_80", "sm_90"])
    assert "b.cu" in unbuilt
    assert local == (
        "_Z4slowPf of a.cu uses local memory on sm_90: 32 bytes of stack, 20 spilled, 16 loaded back"
    )
    assert report.faults(["sm_75"])[1] == "a.cu was not compiled for sm_75"


def test_only_what_the_build_compiles_is_read(tmp_path):
    commands = [
        {"directory": str(tmp_path), "command": f"{compiler} -c {name}", "file": name, "output": f"{name}.o"}
        for compiler, name in [
            ("nvcc -x cu", "a.cu"),
            ("nvcc -x cu", "new.cu"),
            ("c++", "a.cu"),
            ("c++", "b.cpp"),
        ]
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(commands))
    for name in ("a.cu", "removed.cu"):
        (tmp_path / f"{name}.o.ptxas").write_text(PTXAS)
    report = read(tmp_path)
    assert len(report.kernels) == 3
    assert report.missing == ["new.cu"]


@pytest.mark.parametrize("status", [0, 3])
def test_the_launcher_keeps_the_report_and_shows_the_rest(tmp_path, status):
    said, compiler = tmp_path / "said", tmp_path / "compiler"
    said.write_text(PTXAS + "a.cu(3): warning: unused\n")
    compiler.write_text(f"#!/bin/sh\ncat {said} >&2\nexit {status}\n")
    compiler.chmod(0o755)
    run = subprocess.run(
        ["sh", ROOT / "tools/ptxas_log.sh", compiler, "-c", "a.cu", "-o", tmp_path / "a.o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status
    assert run.stderr == "a.cu(3): warning: unused\n"
    assert (tmp_path / "a.o.ptxas").read_text() == said.read_text()


def test_no_kernel_uses_local_memory():
    build = find_build("cp*")
    if build is None:
        pytest.skip("no kernel was compiled: nvcc was not found")
    archs = csp_ext.build_info()["cuda_architectures"].replace("-real", "").split()
    report = read(build)
    assert report.kernels
    assert not report.faults(f"sm_{arch}" for arch in archs if arch.isdigit())
