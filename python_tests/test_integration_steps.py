"""What a decode step over a pruned cache costs the host: no waiting for the device, no Python per layer."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from llava_reference import generate_batch, make_row, small_llava

transformers = pytest.importorskip("transformers")

import csp_ext
from csp_ext.config import CSPConfig
from csp_ext.integration import CSPStaticCache, apply

# Left padding; the third row is shorter than the budget, the fourth has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
CONFIG = CSPConfig(budget=14, decode_n=1.0)
ATTENTIONS = pytest.mark.parametrize("attention", [None, "csp"])
KINDS = pytest.mark.parametrize("kind", ["growing", "fixed", "compiled"])
HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(device: str) -> Any:
    return small_llava(dtype=torch.float64, num_kv_heads=1).to(device)


def of_a_step(count: Callable[[Callable[[], Any]], int], model: Any, rows: list[list[int]], kind: str) -> int:
    """Return by how much a count over a whole generation grows with one more step."""

    def generate(steps: int) -> None:
        options: dict[str, Any] = {"disable_compile": kind != "compiled"}
        if kind != "growing":
            # Of one room for all: another one would be compiled for.
            options["past_key_values"] = CSPStaticCache(model.config, max_new_tokens=8)
        if kind == "compiled":
            compiling = transformers.CompileConfig(fullgraph=True, backend="eager", mode="default")
            compiling._compile_all_devices = True
            options["compile_config"] = compiling
        generate_batch(model, rows, steps, **options)

    generate(4)  # compiles
    several, one_more = (count(lambda steps=steps: generate(steps)) for steps in (4, 5))
    return one_more - several


def host_reads(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        run()
    return sum(event.count for event in record.key_averages() if event.key in HOST_READS)


@pytest.fixture(scope="module", params=[ROWS, ROWS[:1]], ids=["padded", "even"])
def untouched(request: pytest.FixtureRequest, model: Any) -> tuple[list[list[int]], int]:
    """A batch, and how often a step of the untouched model reads the device."""
    with torch.no_grad():
        return request.param, of_a_step(host_reads, model, request.param, "growing")


@ATTENTIONS
@KINDS
def test_a_step_of_generate_reads_nothing_more(
    model: Any, attention: str | None, untouched: tuple[list[list[int]], int], kind: str
) -> None:
    """Once to see whether all rows are done; growing caches also to see whether the mask hides anything."""
    rows, expected = untouched
    torch._dynamo.reset()
    with apply(model, CONFIG, attention=attention):
        found = of_a_step(host_reads, model, rows, kind)
    assert found == (expected if kind == "growing" else 1)


@contextmanager
def nothing_read(device: str) -> Iterator[None]:
    """On a GPU any wait for it raises; on the CPU, where there is none to wait for, reads are counted."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        yield
    assert not {event.key for event in record.key_averages()} & set(HOST_READS)


@ATTENTIONS
@pytest.mark.parametrize("kind", ["growing", "compiled"])
def test_a_forward_reads_nothing(model: Any, attention: str | None, kind: str) -> None:
    torch._dynamo.reset()
    cache = CSPStaticCache(model.config, max_new_tokens=8) if kind == "compiled" else None
    token = torch.full((1, 1), 77, device=model.device)
    compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)
    forward = compiled if kind == "compiled" else model
    options = {"past_key_values": cache, "disable_compile": True}
    with apply(model, CONFIG, attention=attention):
        cache = generate_batch(model, ROWS[:1], 1, **options).past_key_values
        for step in range(4):
            with nothing_read(model.device.type) if step else nullcontext():
                forward(input_ids=token, past_key_values=cache, logits_to_keep=1)


def calls_into_csp_ext(run: Callable[[], Any]) -> int:
    package, seen = str(Path(csp_ext.__file__).parent), 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal seen
        seen += event == "call" and frame.f_code.co_filename.startswith(package)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


@ATTENTIONS
def test_a_compiled_step_runs_no_python_per_layer(attention: str | None) -> None:
    calls = {}
    for layers in (2, 5):
        model = small_llava(num_layers=layers)
        torch._dynamo.reset()
        with apply(model, CONFIG, attention=attention):
            for kind in ("fixed", "compiled"):
                calls[kind, layers] = of_a_step(calls_into_csp_ext, model, ROWS, kind)
    assert calls["fixed", 2] < calls["fixed", 5]
    assert calls["compiled", 2] == calls["compiled", 5] < 10
