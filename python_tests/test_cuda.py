"""The ops on a GPU: against the CPU, on streams, in graphs, without a synchronisation, and what they refuse.

Bodies that make sense on the CPU run there too, so that none of this is code that never ran.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from boundary import assert_select_close
from numeric import RTOL
from test_bad_input import GOOD, TENSORS
from torch import Tensor

import csp_ext
from csp_ext.ops import __all__ as OPS

ON_GPU = torch.cuda.is_available() and csp_ext.cuda_status().loaded
needs_gpu = pytest.mark.skipif(
    not ON_GPU,
    reason="NO GPU WAS TESTED: "
    + (csp_ext.cuda_status().reason if torch.cuda.is_available() else "torch sees no CUDA device"),
)
Problem = tuple[dict[str, Tensor], dict[str, Any]]
BUDGET = 90


def problem(
    op: str, device: str, *, dtype: torch.dtype = torch.float16, seed: int = 0, batch: int = 2,
    kv_heads: int = 2, group: int = 2, window: int = 24, keys: int = 300, head_dim: int = 64,
) -> Problem:  # fmt: skip
    """Return the tensors and the options of one call; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).pow(2)

    modality = torch.randint(-1, 2, (batch, keys), generator=generator, dtype=torch.int8)
    observers = torch.randint(-1, 2, (batch, window), generator=generator, dtype=torch.int8)
    key, value = normal(batch, kv_heads, keys, head_dim), normal(batch, kv_heads, keys, head_dim)
    scores = {"self": positive(batch, kv_heads, keys), "cross": positive(batch, kv_heads, keys)}
    window_of = {"query": normal(batch, kv_heads * group, window, head_dim), "key": key, "modality": modality}
    rows = torch.randint(-1, max(keys, 0), (batch, kv_heads, BUDGET), generator=generator, dtype=torch.int32)
    start = torch.randint(0, keys // 2 + 1, (batch, kv_heads), generator=generator, dtype=torch.int32)
    in_order = ascending(batch, kv_heads, keys, generator)
    options: dict[str, Any] = {"budget": BUDGET, "recent": 8, "combine": "calibrated", "pool": "max"}
    tensors, chosen = {
        "n_softmax": ({"logits": normal(batch, kv_heads, window, keys)}, {"n": 1.5}),
        "segmented_column_sum": (
            {
                "attn": positive(batch, kv_heads, window, keys).to(dtype),
                "query_modality": observers,
                "key_modality": modality,
            },
            {},
        ),
        "score": ({**window_of, "query_modality": observers}, {"n": 1.0}),
        "dual_top_k": (scores, {"k_self": keys // 3, "k_cross": keys // 2, "combine": "union"}),
        "select": ({**scores, "modality": modality, "query_modality": observers}, options),
        "compact": ({"key": key, "value": value, "indices": rows}, {}),
        "compact_": ({"key": key, "value": value, "indices": in_order}, {}),
        "prune": ({**window_of, "value": value, "query_modality": observers}, options),
        "prune_": (
            {**window_of, "value": value, "query_modality": observers},
            {**options, "budget": min(BUDGET, keys)},
        ),
        "decode": (
            {
                "query": normal(batch, kv_heads * group, 2, head_dim),
                "key": key,
                "value": value,
                "start": start,
                "end": torch.tensor(keys - keys // 9, dtype=torch.int32),
            },
            {"n": 1.0},
        ),
    }[op]
    return {name: tensor.to(device) for name, tensor in tensors.items()}, chosen


def ascending(batch: int, heads: int, keys: int, generator: torch.Generator) -> Tensor:
    """Return [B, H, T] int32: random keys in order behind any number of free slots, T of at most `keys`."""
    slots = torch.arange(min(BUDGET, keys))
    kept = torch.rand(batch, heads, keys, generator=generator).argsort(-1)[..., : len(slots)].sort(-1).values
    free = torch.randint(0, len(slots) + 1, (batch, heads, 1), generator=generator)
    return kept.gather(-1, (slots - free).clamp_min(0)).masked_fill(slots < free, -1).int()


def run(op: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    if op.endswith("_"):  # on copies, strides and all: the tensors are wanted as they were
        caches = {}
        for name in ("key", "value"):
            t = tensors[name]
            caches[name] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        return (*caches.values(), *(getattr(csp_ext, op)(**{**tensors, **caches}, **options) or ()))
    result = getattr(csp_ext, op)(**tensors, **options)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compacted(op: str, tensors: dict[str, Tensor], indices: Tensor) -> tuple[Tensor, ...]:
    """Return the caches that prune, or prune_, leaves where it selects `indices`."""
    caches = {"key": tensors["key"], "value": tensors["value"], "indices": indices}
    return run(op.replace("prune", "compact"), caches, {})


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g.cpu(), w.cpu())


def assert_equals_cpu(op: str, got: tuple[Tensor, ...], tensors: dict[str, Tensor], options: dict) -> None:
    """Compare with the CPU op over the same numbers; kept sets up to proven near-ties."""
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    want = run(op, tensors, options)
    got = tuple(tensor.cpu() for tensor in got)
    if op == "select":
        assert_select_close(*got, **tensors, **options)
        return
    if op in ("prune", "prune_"):
        of_score = {name: tensors[name] for name in ("query", "key", "modality", "query_modality")}
        modalities = tensors["modality"], tensors["query_modality"]
        scores = csp_ext.score(**of_score)
        assert_select_close(*got[2:], *scores, *modalities, **options, score_rtol=1e-5)
        assert_same(got[:2], compacted(op, tensors, got[2]))
        return
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        if op in ("compact", "compact_", "dual_top_k"):
            assert torch.equal(g, w)
        else:
            torch.testing.assert_close(g, w, rtol=RTOL[g.dtype], atol=5e-6)


# ---- results ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_equals_the_cpu(device, op, dtype):
    for seed, sizes in enumerate(
        (
            {},
            {"keys": 77, "window": 3, "head_dim": 40},
            {"batch": 1, "kv_heads": 1, "group": 7, "keys": 2000, "head_dim": 128},
        )
    ):
        tensors, options = problem(op, device, dtype=dtype, seed=seed, **sizes)
        assert_equals_cpu(op, run(op, tensors, options), tensors, options)


@pytest.mark.parametrize("op", OPS)
def test_prune_and_its_parts_take_strange_views(device, op):
    """Tensors that begin one element past an aligned address, with rows an odd number of elements apart."""
    tensors, options = problem(op, device, head_dim=64)
    views = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            views[name] = torch.stack([tensor, tensor])[1]
            continue
        wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=device)
        views[name] = wide[..., 1:-2].copy_(tensor)
    assert_equals_cpu(op, run(op, views, options), tensors, options)


EMPTY = [
    {"batch": 0},
    {"kv_heads": 0},
    {"keys": 0, "window": 0},
    {"window": 0},
    {"keys": 24, "batch": 0},
    {"head_dim": 0},
]


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_problems(device, op, sizes):
    if op == "decode" and sizes.get("head_dim") == 0:
        pytest.skip("decode refuses a head_dim of 0")
    if op == "prune_" and sizes.get("keys") == 0:
        pytest.skip("no budget fits in place into a cache without slots")
    tensors, options = problem(op, device, **sizes)
    assert_same(run(op, tensors, options), run(op, {n: t.cpu() for n, t in tensors.items()}, options))


MANY = 70000


@pytest.mark.parametrize("sizes", [{"batch": MANY, "kv_heads": 1}, {"batch": 1, "kv_heads": MANY}], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_a_grid_is_high(device, op, sizes):
    if device == "cpu" and op in ("score", "prune", "prune_", "decode"):
        sizes = {name: min(size, 700) for name, size in sizes.items()}
    tensors, options = problem(op, device, group=1, window=2, keys=12, head_dim=8, **sizes)
    if op in ("select", "prune", "prune_"):
        options = {"budget": 5, "recent": 1, "combine": "union"}
    got = run(op, tensors, options)
    if op == "select":
        assert_same(got, run(op, {name: tensor.cpu() for name, tensor in tensors.items()}, options))
    elif op in ("prune", "prune_"):
        assert_same(got, chain(op, tensors, options))
    else:
        assert_equals_cpu(op, got, tensors, options)


def chain(op: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    of_score = {name: tensor for name, tensor in tensors.items() if name != "value"}
    modalities = tensors["modality"], tensors["query_modality"]
    indices, lengths = csp_ext.select(*csp_ext.score(**of_score), *modalities, **options)
    return (*compacted(op, tensors, indices), indices, lengths)


def test_offsets_beyond_32_bits(device):
    """Only the last slots of a cache of more than 2^31 elements count: the result is that of these alone."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    length, seen, dim = (2**24 + 3 if device == "cuda" else 2000), 200, 128
    cache = torch.zeros(1, 1, length, dim, dtype=torch.float16, device=device)
    tail = torch.randn(seen, dim, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    cache[0, 0, -seen:] = tail
    last = tail[None, None].clone()
    query = torch.randn(1, 2, 4, dim, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)

    rows = torch.arange(length - seen, length, dtype=torch.int32, device=device)[None, None]
    assert torch.equal(csp_ext.compact(cache, cache, rows)[0], last)

    start = torch.tensor([length - seen], dtype=torch.int32, device=device)
    for got, want in zip(
        csp_ext.decode(query, cache, cache, start), csp_ext.decode(query, last, last), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5)

    modality = torch.full((1, length), -1, dtype=torch.int8, device=device)
    modality[0, -seen:] = torch.arange(seen, device=device) % 2
    own, other = csp_ext.score(query, cache, modality)
    for got, want in zip((own, other), csp_ext.score(query, last, modality[:, -seen:]), strict=True):
        torch.testing.assert_close(got[..., -seen:], want, rtol=1e-5, atol=1e-30)
        assert not got[..., :-seen].any()

    csp_ext.compact_(cache[..., :64], cache[..., 64:], rows)
    assert torch.equal(cache[:, :, :seen], last)


@pytest.mark.parametrize("op", OPS)
def test_bits_repeat(device, op):
    tensors, options = problem(op, device, keys=5000, window=40, head_dim=128)
    first = run(op, tensors, options)
    for _ in range(5):
        assert_same(run(op, tensors, options), first)


@needs_gpu
def test_values_out_of_range_act_as_none():
    tensors, _ = problem("compact", "cuda")
    length = tensors["key"].shape[2]
    indices = tensors["indices"].clone()
    indices[0, 0, :5] = torch.tensor([-7, length, 2**31 - 1, -(2**31), 3])
    got = csp_ext.compact(tensors["key"], tensors["value"], indices)
    want = csp_ext.compact(
        tensors["key"], tensors["value"], torch.where(indices < length, indices, -1).clamp(-1)
    )
    assert_same(got, want)

    tensors, _ = problem("compact_", "cuda")
    indices = tensors["indices"]
    odd = torch.tensor([-7, length, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    strange = torch.where(torch.rand(indices.shape, device="cuda") < 0.2, odd[indices % 4], indices)
    want = run("compact_", {**tensors, "indices": torch.where(strange < length, strange, -1).clamp(-1)}, {})
    assert_same(run("compact_", {**tensors, "indices": strange}, {}), want)

    tensors, _ = problem("decode", "cuda")
    start, capacity = tensors.pop("start"), tensors["key"].shape[2]
    tensors.pop("end")
    start[0] = torch.tensor([-5, capacity + 9])
    got = csp_ext.decode(
        **tensors, start=start, end=torch.tensor(capacity + 4, dtype=torch.int32, device="cuda")
    )
    assert_same(got, csp_ext.decode(**tensors, start=start.clamp(0, capacity)))
    assert bool((got[1][0, 2:] == -torch.inf).all())
    out, lse = csp_ext.decode(**tensors, end=torch.tensor(-4, dtype=torch.int32, device="cuda"))
    assert not out.any()
    assert bool((lse == -torch.inf).all())


# ---- torch's machinery ----


class Op(torch.nn.Module):
    """An op with its options; the tensors come by position, as some are named self."""

    def __init__(self, op: str, names: Iterable[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.names, self.options = op, tuple(names), options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(self.op, dict(zip(self.names, tensors, strict=True)), self.options)


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(device, op):
    tensors, options = problem(op, device)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(Op(op, tensors, options), fullgraph=True, backend=backend)
    assert_same(compiled(*tensors.values()), run(op, tensors, options))


@pytest.mark.parametrize("op", OPS)
def test_an_exported_program_comes_back_from_a_file(device, op):
    tensors, options = problem(op, device)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Op(op, tensors, options), tuple(tensors.values())), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same(loaded(*tensors.values()), run(op, tensors, options))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    tensors, options = problem(op, device)
    torch.library.opcheck(getattr(torch.ops.csp, op).default, (), {**tensors, **options})


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Capture a call in a CUDA graph; return what replays it and the outputs it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


@pytest.mark.parametrize("op", OPS)
def test_a_graph_follows_its_inputs(device, op):
    tensors, options = problem(op, device)
    if device == "cuda":
        replay, outputs = captured(lambda: run(op, tensors, options))
    for seed in (1, 2, 3):
        changed, _ = problem(op, device, seed=seed)
        for name, tensor in tensors.items():
            tensor.copy_(changed[name])
        if device == "cuda":
            replay()
        else:
            outputs = run(op, tensors, options)
        assert_same(outputs, run(op, changed, options))


def test_prune_and_decode_in_one_graph(device):
    """A whole step: what decode reads is what the replayed prune has just written."""
    tensors, options = problem("prune", device)

    def step() -> tuple[Tensor, ...]:
        key, value, _, lengths = csp_ext.prune(**tensors, **options)
        return csp_ext.decode(tensors["query"][:, :, -1:], key, value, BUDGET - lengths)

    if device == "cuda":
        replay, outputs = captured(step)
    for seed in (4, 5):
        changed, _ = problem("prune", device, seed=seed)
        for name, tensor in tensors.items():
            tensor.copy_(changed[name])
        if device == "cuda":
            replay()
            assert_same(outputs, step())
        else:
            assert_same(step(), step())


# ---- streams, devices, memory ----


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_nothing_synchronises(op, no_synchronisation):
    torch.cuda.set_sync_debug_mode("default")
    tensors, options = problem(op, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    run(op, tensors, options)


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_side_stream_behind_a_slow_producer(op):
    """The op is queued while its inputs are not yet there, and returns before they are."""
    tensors, options = problem(op, "cuda")
    want = run(op, tensors, options)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, late, options)  # its memory is the stream's from here on: an allocation may synchronise
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        got = run(op, late, options)
        waited = stream.query()
    stream.synchronize()
    assert not waited, "the call came back only after the stream was done"
    assert_same(got, want)


@needs_gpu
def test_scratch_is_not_handed_on_too_early():
    """Scratch is freed while the kernels are still queued; only later work of the same stream may have it."""
    tensors, options = problem("prune", "cuda", keys=5000, window=40)
    want = run("prune", tensors, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    size = {"num_heads": 4, "num_kv_heads": 2, "window": 40, "keys": 5000, "head_dim": 64, "batch": 2}
    plan = csp_ext.plan(
        "prune", device="cuda", **csp_ext.cuda_device(), **size, **options, dtype="float16"
    )  # fmt: skip
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = run("prune", tensors, options)
        torch.full((plan["workspace_bytes"],), 255, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        torch.full((plan["workspace_bytes"],), 255, dtype=torch.uint8, device="cuda")
    stream.synchronize()
    assert_same(got, want)


@needs_gpu
@pytest.mark.parametrize("op", ["prune", "prune_"])
def test_prune_leaves_nothing_but_its_results(op):
    sizes = {"batch": 2, "window": 40, "keys": 5000, "head_dim": 64}
    tensors, options = problem(op, "cuda", **sizes)
    plan = csp_ext.plan(
        op, device="cuda", **csp_ext.cuda_device(), **sizes, **options, dtype="float16",
        num_heads=4, num_kv_heads=2,
    )  # fmt: skip
    getattr(csp_ext, op)(**tensors, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()

    def requested(when: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]

    before = requested("current")
    results = getattr(csp_ext, op)(**tensors, **options)
    kept = sum(tensor.nbytes for tensor in results)
    assert requested("current") - before == kept
    assert requested("peak") - before == kept + plan["workspace_bytes"]


@needs_gpu
def test_compact_in_place_allocates_nothing():
    tensors, _ = problem("compact_", "cuda", keys=5000)
    csp_ext.compact_(**tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    csp_ext.compact_(**tensors)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] == before


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_device_that_is_not_the_current_one(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("ONE GPU ONLY: an op on a device that is not the current one was not tested")
    tensors, options = problem(op, "cuda:1")
    torch.cuda.set_device(0)
    got = run(op, tensors, options)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in got)
    assert_same(got, run(op, {name: tensor.to("cuda:0") for name, tensor in tensors.items()}, options))


# ---- what is refused ----


@needs_gpu
@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair[0] != "n_softmax"])
def test_tensors_on_two_devices(op, name):
    arguments = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in GOOD[op].items()}
    getattr(csp_ext, op)(**arguments)
    arguments[name] = arguments[name].cpu()
    match = rf"csp::{op}: \w+ must be on the device of \w+ \((cpu|cuda:0)\), got (cpu|cuda:0)"
    with pytest.raises(ValueError, match=match):
        getattr(csp_ext, op)(**arguments)
    with pytest.raises(RuntimeError, match=match):
        getattr(torch.ops.csp, op)(**arguments)


@needs_gpu
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("compact")])
def test_float64_is_refused_by_name(op):
    tensors, options = problem(op, "cuda", dtype=torch.float64)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    match = rf"csp::{op}: (query|self|attn|logits) is float64, .*use csp_ext\.reference\.{op}"
    with pytest.raises(ValueError, match=match):
        run(op, tensors, options)
    with pytest.raises(RuntimeError, match=match):
        getattr(torch.ops.csp, op)(**tensors, **options)


@needs_gpu
def test_more_than_the_gpu_has():
    scores = torch.ones(1, 1, 1, device="cuda").expand(1, 2**40, 6)
    modality = torch.zeros(1, 6, dtype=torch.int8, device="cuda")
    with pytest.raises(MemoryError, match="csp::select: out of memory"):
        csp_ext.select(scores, scores, modality, modality[:, :2], budget=4)
    torch.cuda.synchronize()


CHECKED = """
import sys
import torch
import csp_ext

device = sys.argv[1]
key = torch.ones(2, 2, 5, 8, device=device)
query = torch.ones(2, 4, 1, 8, device=device)

def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=device)

csp_ext.compact(key, key, ints([[[0, -1]]]).expand(2, 1, 2))
csp_ext.decode(query, key, key, ints([0, 5]), ints(5))
for call in (
    lambda: csp_ext.compact(key, key, ints([[[0, 5]]]).expand(2, 1, 2)),
    lambda: csp_ext.compact(key, key, ints([[[0], [0]], [[0], [-2]]])),
    lambda: csp_ext.compact_(key, key.clone(), ints([[[0, 5]]]).expand(2, 1, 2)),
    lambda: csp_ext.compact_(key, key.clone(), ints([[[0, 1]], [[3, 2]]])),
    lambda: csp_ext.decode(query, key, key, ints([0, 6])),
    lambda: csp_ext.decode(query, key, key, ints([[0, -1], [0, 0]])),
    lambda: csp_ext.decode(query, key, key, None, ints(6)),
    lambda: csp_ext.decode(query, key, key, None, ints(-1)),
):
    try:
        call()
        print("nothing")
    except ValueError as error:
        print(error)
"""
COMPLAINTS = [
    "csp::compact: indices must lie in [-1, L = 5), got 5 at [0, 0, 1]",
    "csp::compact: indices must lie in [-1, L = 5), got -2 at [1, 1, 0]",
    "csp::compact_: indices must lie in [-1, L = 5), got 5 at [0, 0, 1]",
    "csp::compact_: indices must ascend along T, -1 aside, got 2 too late at [1, 0, 1]",
    "csp::decode: start must be between 0 and the capacity 5, got 6 for row 1, head 0",
    "csp::decode: start must be between 0 and the capacity 5, got -1 for row 0, head 1",
    "csp::decode: end must be between 0 and the capacity 5, got 6",
    "csp::decode: end must be between 0 and the capacity 5, got -1",
]


@pytest.mark.parametrize("check", ["1", "0"])
def test_csp_check_looks_at_values(device, check):
    """A process of its own: the variable is read once."""
    answer = subprocess.run(
        [sys.executable, "-c", CHECKED, device],
        env={**os.environ, "CSP_CHECK": check},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert answer == (COMPLAINTS if check == "1" or device == "cpu" else ["nothing"] * len(COMPLAINTS))


# ---- a model ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_llava(device, dtype):
    pytest.importorskip("transformers")
    from llava_reference import generate_batch, make_row, small_llava

    from csp_ext.integration import apply

    model = small_llava(dtype=dtype, num_heads=4, num_kv_heads=2).to(device)
    rows = [make_row("5i3i12", 1), make_row("2i20", 2)]
    whole = generate_batch(model, rows, 4)
    with apply(model, budget=1.0):
        same = generate_batch(model, rows, 4)
    assert torch.equal(whole.sequences, same.sequences)
    with apply(model, budget=14) as handle:
        pruned = generate_batch(model, rows, 4)
    assert pruned.sequences.device.type == device
    assert all(bool((layer.lengths == 14).all()) for layer in handle.stats.layers)
