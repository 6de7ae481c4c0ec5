"""The benchmarks run: every script on the GPU's problems cut down, the GPU's clock on a stand-in for one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
OPS = sorted(script.stem.removeprefix("bench_") for script in BENCH.glob("bench_*.py"))


@pytest.fixture
def bench(monkeypatch):
    """Import a module of the bench folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for module in [m for m in sys.modules.values() if str(BENCH) in str(getattr(m, "__file__", ""))]:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("op", OPS)
def test_every_benchmark_runs(bench, capsys, op):
    bench(f"bench_{op}").main(["--tiny", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["rows"]
    for row in result["rows"]:
        assert row["csp ms"] > 0
        assert row["MB"] > 0
        assert row["of bound"] > 0
    said = bench("harness").verdicts(result["rows"])
    assert all(": met, " in line or ": MISSED, " in line or ": not measured" in line for line in said)
    assert bool(said) == (op in ("score", "select", "compact", "prune", "decode", "overhead"))
    assert bench("run_all").markdown(result).count("\n| ") == len(result["rows"]) + 1


def test_a_table_for_people(bench, capsys):
    bench("bench_decode").main(["--tiny"])
    printed = capsys.readouterr().out
    assert "sdpa / csp" in printed
    assert "of copy bandwidth >= 85%: " in printed


class FakeCuda:
    """Stands in for torch.cuda: a clock that each call moves on, events that read it, no GPU."""

    def __init__(self):
        self.now, self.captured, self.flushes = 0.0, None, 0
        self.held, self.peak = 300, 1000
        fake = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = fake.now

            def synchronize(self):
                assert self.at is not None

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                fake.now += fake.captured

        self.Event, self.CUDAGraph = Event, Graph

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 12)

    def synchronize(self):
        pass

    def memory_allocated(self):
        return self.held

    def reset_peak_memory_stats(self):
        self.peak = self.held

    def max_memory_allocated(self):
        return self.peak

    def graph(self, graph):
        fake = self

        class Capture:
            def __enter__(self):
                self.before = fake.now

            def __exit__(self, kind, error, trace):
                fake.captured, fake.now = fake.now - self.before, self.before

        return Capture()


@pytest.fixture
def gpu(bench, monkeypatch):
    """Return the clock, on the CPU, and the fake it asks."""
    clock, cuda = bench("clock"), FakeCuda()

    def flush(clock):
        cuda.flushes += 1
        cuda.now += 5e-5

    monkeypatch.setattr(clock.CudaClock, "_flush", flush)
    return clock, clock.CudaClock(cuda, device="cpu"), cuda


def test_the_gpu_clock_times_the_call_alone(gpu):
    module, clock, cuda = gpu

    def takes(seconds):
        def side():
            cuda.now += seconds

        return side

    times = module.interleave({"csp": takes(1e-5), "peer": takes(4e-5)}, repeats=5, clock=clock)
    assert times["csp"].median == pytest.approx(1e-5)
    assert times["peer"].median == pytest.approx(4e-5)
    assert clock.graph(takes(1e-5)) == pytest.approx(1e-5)


def test_the_stream_is_kept_busy_while_the_host_issues_a_call(gpu):
    _, clock, cuda = gpu
    before = cuda.flushes
    clock.sample(lambda: None, prepared=1e-6)
    assert cuda.flushes - before == 2
    clock.sample(lambda: None, prepared=1e-3)
    assert cuda.flushes - before > 2 + 1e-3 / 5e-5


def test_new_memory_is_the_peak_beyond_what_was_there(gpu):
    module, clock, cuda = gpu

    def allocates():
        cuda.peak, cuda.held = max(cuda.peak, cuda.held + 90), cuda.held + 20

    assert clock.new_bytes(allocates) == 90
    kept = torch.ones(1000)
    assert module.CpuClock().new_bytes(lambda: (kept + 1).sum()) == pytest.approx(4000, abs=64)
    assert module.CpuClock().new_bytes(lambda: kept.add_(1)) < 64


def test_what_cannot_be_captured_is_said(gpu):
    _, clock, _ = gpu

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert clock.graph(waits) is None


def test_a_peer_without_memory_is_left_out(bench):
    def large():
        raise torch.OutOfMemoryError

    assert set(bench("clock").interleave({"csp": int, "peer": large}, repeats=1)) == {"csp"}


def test_targets(bench):
    harness, clock = bench("harness"), bench("clock")
    times = {name: clock.Timing(t, t, t) for name, t in {"csp": 10e-6, "peer": 150e-6, "lse": 5e-6}.items()}
    measured = harness.Measured(times, 8_000_000, 10**9, harness.Bounds(1e12, 1e12, 1e15))
    assert harness.at_most(12).verdict(measured) == "us <= 12.0: met, 10.0"
    assert harness.at_most(8).verdict(measured) == "us <= 8.0: MISSED, 10.0"
    assert harness.copy_share(0.85).verdict(measured) == "of copy bandwidth >= 85%: MISSED, 80%"
    assert harness.matrix_share(0.19, passes=2).verdict(measured) == "of matrix rate >= 19%: met, 20%"
    assert harness.faster_than("peer", 14).verdict(measured) == "peer / csp >= 14.00: met, 15.00"
    assert harness.faster_than("other").verdict(measured) == "other / csp >= 1.00: not measured"
    assert harness.variant_share("lse", 0.6).verdict(measured) == "time with lse <= 60%: met, 50%"


def test_a_failing_benchmark_does_not_lose_the_others(bench, tmp_path, capsys, monkeypatch):
    module = bench("run_all")
    row = {"case": "a", "csp us": 1.5, "of bound": 0.5, "targets": ["us <= 2.0: met, 1.5"]}
    about = {"gpu": "NVIDIA H200", "torch": "2.11", "cuda": "13.0", "driver": "580"}
    monkeypatch.setattr(module, "setting", lambda device: about)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    good = {"title": "decode", "build": about, "bounds": {"copy GB/s": 4300.0}, "rows": [row]}
    monkeypatch.setattr(module, "run", lambda script, *_: good if "decode" in script.stem else "broke")
    with pytest.raises(SystemExit, match="failed: score"):
        module.main(device="cuda", name="x", folder=tmp_path, only="score,decode")
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["benchmarks"] == [good]
    assert kept["failed"] == {"score": "broke"}
    assert kept["gpu"] == "NVIDIA H200"
    assert "| a | 1.5 | 0.5 |" in (tmp_path / "x.md").read_text()
    assert "1 met, 0 missed" in capsys.readouterr().out


def test_a_benchmark_that_hangs_is_stopped(bench, tmp_path):
    script = tmp_path / "bench_slow.py"
    script.write_text("import time; time.sleep(60)")
    assert bench("run_all").run(script, [], limit=0.2) == "stopped after 0.2 s"


def test_snapkv_keeps_what_its_formula_says(bench):
    """The adapter hands kvpress our queries unchanged."""
    pytest.importorskip("kvpress")
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 8, 16), torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)
    kept_key, kept_value = bench("peers").snapkv(query, key, value, 20)()
    assert kept_key.shape == kept_value.shape == (2, 2, 20, 16)
    position = torch.arange(60)
    logits = torch.matmul(query.view(2, 2, 24, 16), key.transpose(2, 3)).view(2, 6, 8, 60) / 4
    logits.masked_fill_(position > position[-8:, None], -torch.inf)
    mean = logits.softmax(-1)[..., :52].mean(2)
    pooled = torch.nn.functional.avg_pool1d(mean, 5, padding=2, stride=1).view(2, 2, 3, 52).mean(2)
    want = torch.cat([pooled.topk(12).indices, position[-8:].expand(2, 2, -1)], -1).sort(-1).values
    rows = (kept_key[:, :, :, None] == key[:, :, None]).all(-1).float().argmax(-1).sort(-1).values
    assert torch.equal(rows, want)


def gpu_script(tmp_path, **variables):
    """Run bench/gpu.sh with its folders below tmp_path; return the finished process."""
    folders = {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
    return subprocess.run(
        ["bash", BENCH / "gpu.sh"],
        env={**os.environ, **folders, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_gpu_script_refuses_a_stage_it_does_not_know(tmp_path):
    run = gpu_script(tmp_path, STAGES="build tset")
    assert run.returncode == 2
    assert "no such stage: tset" in run.stderr


def test_the_gpu_script_says_what_is_not_built(tmp_path):
    run = gpu_script(tmp_path, STAGES="test bench model")
    assert run.returncode == 1
    summary = run.stdout.split("==> summary")[1]
    assert summary.count("SKIPPED") == 3
    assert "the package is not built: run the stage build" in summary
