"""One decode step of one layer, as the model ran it and as float64 says: for every way to attend.

The full cache is taken down from the layer's own queries, keys and values after RoPE; what the layer dropped
is masked there, and the n-softmax written out. Of the integration only the kept positions are believed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import flash_stand_in
import torch
from llava_reference import make_pixels, make_row, pad_batch, small_llava
from torch import Tensor

import csp_ext
from csp_ext.config import CSPConfig
from csp_ext.integration import CSPStaticCache, front

ATTENTIONS = ("eager", "sdpa", "csp", "flash_attention_2")
DECODE_N = (0.0, 1.0, 2.5)
BATCHES = ("plain", "left padding", "heads of different lengths", "padding inside", "within the budget")
QUERIES = (1, 3, 9)  # new tokens of each step; 9 are more than ``decode`` takes
HEADS, BUDGET = 4, 14

ROWS = [make_row("5i3i12", 1), make_row("3i9i8", 2)]
PADDED_ROWS = [ROWS[0], make_row("2i20", 2), make_row("9", 3)]  # the last is shorter than the budget
GAPS = [[(0, 4), (25, 5), (40, 3)], [(0, 12), (30, 14)], [(4, 34), (9, 21)]]
# What stands in both lists stays, however many that are.
LISTS = {"k_self": 14, "k_cross": 14, "window": 30, "recent": 4, "hop": 0, "pool": "none"}


@dataclass(frozen=True)
class Combination:
    """A way to attend to a kind of pruned cache."""

    attention: str
    decode_n: float
    kv_heads: int
    batch: str
    static: bool
    dtype: torch.dtype
    seed: int = 0

    def __str__(self) -> str:
        cache, kind = "static" if self.static else "dynamic", str(self.dtype).removeprefix("torch.")
        name = f"{self.attention}-n{self.decode_n:g}-{self.kv_heads}of{HEADS}-{self.batch}-{cache}-{kind}"
        return name.replace(" ", "_")

    @property
    def config(self) -> CSPConfig:
        if self.batch == "heads of different lengths":
            return CSPConfig(budget=20, combine="intersection", decode_n=self.decode_n, **LISTS)
        return CSPConfig(budget=200 if self.batch == "within the budget" else BUDGET, decode_n=self.decode_n)


@dataclass
class Step:
    """What one forward of new tokens gave.

    Attributes
    ----------
    queries : int
        q.
    output, expected : Tensor
        [B, q, Hq, D], of the layer's attention.
    largest_value, largest_logit : float
        In absolute terms, of the keys that some query sees.
    kept : Tensor
        [B, Hq], how many tokens of the prompt are seen.
    decoded : bool
        Whether csp_ext's own kernel attended.
    """

    queries: int
    output: Tensor
    expected: Tensor
    largest_value: float
    largest_logit: float
    kept: Tensor
    decoded: bool

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest value: the output is a mean of values."""
        difference = (self.output.double() - self.expected).abs().nan_to_num(torch.inf)
        return float(difference.max()) / self.largest_value


@dataclass
class Tape:
    """Queries of the last forward; keys and values of all of them; what attention returned."""

    query: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    decoded: bool = False


def combinations(dtypes: tuple[torch.dtype, ...]) -> Iterator[Combination]:
    """Yield every combination."""
    parts = (ATTENTIONS, DECODE_N, (HEADS, HEADS // 2), BATCHES, (False, True), dtypes)
    for attention, decode_n, kv_heads, batch, static, dtype in itertools.product(*parts):
        yield Combination(attention, decode_n, kv_heads, batch, static, dtype)


@torch.no_grad()
def run(combination: Combination, queries: tuple[int, ...] = QUERIES) -> list[Step]:
    """Prune a prompt, then feed new tokens, so many at a time, and compare every step."""
    model, steps = _model(combination.kv_heads, combination.dtype, combination.seed), []
    inputs = _prompt(combination.batch)
    real = inputs["attention_mask"].bool()
    rows = [row[keep].tolist() for row, keep in zip(inputs["input_ids"], real, strict=True)]
    cache: Any = CSPStaticCache(model.config, max_new_tokens=sum(queries)) if combination.static else None
    with (
        _attending(model, combination.attention) as options,
        _recorded(model) as tape,
        csp_ext.apply(model, combination.config, **options) as handle,
    ):
        prompt = real
        positions = (real.long().cumsum(-1) - 1).clamp_min(0)
        pixels = make_pixels(rows, combination.dtype)
        cache = model(
            **inputs, position_ids=positions, pixel_values=pixels, past_key_values=cache
        ).past_key_values
        generator = torch.Generator().manual_seed(combination.seed)
        for count in queries:
            real = torch.nn.functional.pad(real, (0, count), value=True)
            tape.decoded = False
            model(
                input_ids=torch.randint(4, 384, (len(rows), count), generator=generator),
                attention_mask=real.long(),
                position_ids=(real.long().cumsum(-1) - 1)[:, -count:],
                past_key_values=cache,
            )
            kept = _kept(handle.stats.layers[0].indices, prompt)
            steps.append(_compare(tape, kept, real, combination.decode_n))
    return steps


@functools.cache
def _model(kv_heads: int, dtype: torch.dtype, seed: int) -> Any:
    return small_llava(seed, dtype=dtype, num_layers=1, num_heads=HEADS, num_kv_heads=kv_heads)


def _prompt(batch: str) -> dict[str, Tensor]:
    if batch == "plain":
        return pad_batch(ROWS)
    return pad_batch(PADDED_ROWS, GAPS if batch == "padding inside" else None)


@contextmanager
def _attending(model: Any, attention: str) -> Iterator[dict[str, str]]:
    """Load the model's own attention; gives what ``apply`` is to be told beside it."""
    own = attention == "csp"
    flash = attention == "flash_attention_2"
    with flash_stand_in.installed() if flash else nullcontext():
        model.set_attn_implementation({"text_config": "sdpa" if own else attention})
        yield {"attention": "csp"} if own else {}
        model.set_attn_implementation({"text_config": "sdpa"})


@contextmanager
def _recorded(model: Any) -> Iterator[Tape]:
    """Take down what goes into the layer's attention, and what comes out."""
    from transformers.models.llama import modeling_llama

    tape, layer = Tape(), model.model.language_model.layers[0].self_attn
    rotate, decode = modeling_llama.apply_rotary_pos_emb, front.decode

    def rotated(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = rotate(*args, **kwargs)
        tape.query = query
        tape.keys.append(key)
        return query, key

    def decoded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tape.decoded = True
        return decode(*args, **kwargs)

    def projected(_module: Any, _inputs: Any, value: Tensor) -> None:
        tape.values.append(value.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2))

    def attended(_module: Any, inputs: tuple[Tensor]) -> None:
        tape.output = inputs[0].unflatten(-1, (-1, layer.head_dim))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotated))
        stack.enter_context(mock.patch.object(front, "decode", decoded))
        stack.callback(layer.v_proj.register_forward_hook(projected).remove)
        stack.callback(layer.o_proj.register_forward_pre_hook(attended).remove)
        yield tape


def _kept(indices: Tensor, real: Tensor) -> Tensor:
    """Return the prompt positions that stay, bool [B, Hs, L]."""
    place = torch.where(indices < 0, real.shape[1], indices.long())  # a free slot points behind the row
    kept = torch.zeros(*indices.shape[:2], real.shape[1] + 1, dtype=torch.bool)
    return kept.scatter_(2, place, True)[..., :-1]


def _compare(tape: Tape, kept: Tensor, real: Tensor, n: float) -> Step:
    """Attend in float64 to all keys of which a head has kept the prompt's `kept`, [B, Hs, L]."""
    query, queries = tape.query.double(), tape.query.shape[2]
    group = query.shape[1] // tape.keys[0].shape[1]
    key, value = (
        torch.cat(parts, dim=2).double().repeat_interleave(group, dim=1) for parts in (tape.keys, tape.values)
    )
    length, prompt = key.shape[2], kept.shape[2]
    kept = kept.expand(-1, query.shape[1] // group, -1).repeat_interleave(group, dim=1)  # [B, Hq, L]
    dropped = (real[:, None, :prompt] & ~kept).any(-1)
    seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries) & real[:, None, None]
    seen = seen.expand(-1, query.shape[1], -1, -1).clone()
    seen[..., :prompt] &= kept[:, :, None]
    logits = query @ key.mT / query.shape[-1] ** 0.5
    # exp(-600) is not 0 and exp(600) no overflow: no shift is needed.
    assert logits.abs().max() < 600
    mass = logits.exp() * seen
    below = mass.sum(-1, keepdim=True) + n * dropped[..., None, None]
    return Step(
        queries=queries,
        output=tape.output,
        expected=(mass / below @ value).transpose(1, 2),
        largest_value=float((value.abs() * seen.any(2)[..., None]).max()),
        largest_logit=float((logits.abs() * seen).max()),
        kept=seen[:, :, 0, :prompt].sum(-1),
        decoded=tape.decoded,
    )
