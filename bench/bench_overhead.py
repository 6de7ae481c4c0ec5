"""Decode steps over a pruned cache, against the untouched model over a cache of the same kind and length.

Both read as many keys and weights, so what differs is the work around them: in Python and in masks. Nothing
is compiled. A call is four steps, as `generate` takes them, and the cache is cropped after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Bench, Target, arguments
from torch import Tensor
from transformers import DynamicCache, StaticCache

import csp_ext
from csp_ext.integration.prompt import ANNOUNCED, Prompt
from csp_ext.tiny_llava import build_tiny_llava

STEPS = 4  # of one call
TEXT = 100  # any id that is no placeholder


@dataclass(frozen=True)
class Decoder:
    """A tiny LLaVA, and the tokens of its prompt that are kept; four times as many are given."""

    layers: int
    heads: int
    head_dim: int
    kept: int

    @property
    def hidden(self) -> int:
        """Width of the decoder."""
        return self.heads * self.head_dim

    def tiny(self) -> Decoder:
        """Return a problem of the same kind that takes no time."""
        return replace(self, layers=min(self.layers, 3), head_dim=16, kept=32)

    def build(self, device: str) -> Any:
        """Return the model, with grouped heads."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return build_tiny_llava(
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads // 2,
            head_dim=self.head_dim,
            dtype=dtype,
        ).to(device)


DECODERS = (Decoder(2, 4, 16, 512), Decoder(32, 4, 64, 512))


def twin(model: Any) -> Any:
    """Return a model of its own that shares the parameters."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def steps(model: Any, cache: Any, mask: Tensor, handle: Any = None) -> Callable[[], None]:
    """Return what takes the steps over a cache, and forgets them again."""
    rows = mask.shape[0]
    token = torch.full((rows, 1), TEXT, device=mask.device)
    real, before = mask.sum(-1, keepdim=True), mask.shape[1]
    mask = torch.nn.functional.pad(mask, (0, STEPS), value=1)
    prompt = Prompt(handle, before, single=True, reached=True)  # a step of generate, as its wrapper says it

    def side() -> None:
        announced = ANNOUNCED.set(prompt)
        for step in range(STEPS):
            model(
                input_ids=token,
                attention_mask=None if rows == 1 else mask[:, : before + step + 1],
                position_ids=real + step,
                past_key_values=cache,
                logits_to_keep=1,
            )
        ANNOUNCED.reset(announced)
        take_back(cache)

    return side


def take_back(cache: Any) -> None:
    """Forget the steps at the least cost: the stock fixed cache has no crop, ours looks at its length."""
    for layer in cache.layers:
        if isinstance(cache, StaticCache):
            layer.cumulative_length.sub_(STEPS)
        elif isinstance(cache, csp_ext.CSPStaticCache):
            layer.end.sub_(STEPS)
        else:
            layer.crop(-STEPS)


def prompt_of(decoder: Decoder, rows: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Return ids [rows, length] and their mask; the last row is padded to more than half of what is kept."""
    ids = torch.full((rows, length), TEXT, device=device)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, : length - decoder.kept // 2] = 0
    return ids, mask


AT_MOST = Target("csp / untouched", lambda m: 1 / m.share("untouched"), 1.05, least=False, peer="untouched")


def measure(bench: Bench, decoder: Decoder, rows: int) -> None:
    """Measure a growing and a fixed cache, with the model's attention and our own."""
    model = decoder.build(bench.device)
    ids, mask = prompt_of(decoder, rows, decoder.kept, bench.device)
    peers, caches = {}, []
    for fixed in (False, True):
        cache = StaticCache(model.config, max_cache_len=decoder.kept + STEPS) if fixed else DynamicCache()
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        peers[fixed] = {"untouched": steps(model, cache, mask)}
        caches.append(cache)
    weights = [p for p in model.model.language_model.parameters() if p.ndim == 2]
    stored = 2 * decoder.layers * caches[0].layers[0].keys.numel()
    plan = {
        "bytes_read": STEPS * (sum(p.nbytes for p in weights) + stored * weights[0].itemsize),
        "bytes_written": 0,
        "flops": 2 * STEPS * (rows * sum(p.numel() for p in weights) + stored * 2),
        "workspace_bytes": 0,
        "launches": 0,
    }
    ids, mask = prompt_of(decoder, rows, 4 * decoder.kept, bench.device)
    for attention in (None, "csp"):
        for fixed in (False, True):
            ours = twin(model)
            handle = csp_ext.apply(ours, budget=decoder.kept, attention=attention)
            cache = csp_ext.CSPStaticCache(ours.config, max_new_tokens=STEPS) if fixed else None
            cache = ours(input_ids=ids, attention_mask=mask, past_key_values=cache).past_key_values
            assert cache.layers[0].slots == decoder.kept
            bench.row(
                f"{decoder.layers} x {decoder.hidden} B={rows}{', padded' * (rows > 1)}, "
                f"{'fixed' if fixed else 'growing'}, {attention or 'sdpa'}",
                steps(ours, cache, mask, handle),
                peers[fixed],
                plan,
                targets=[AT_MOST] if decoder.layers > 2 else [],
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench(f"overhead, {STEPS} eager decode steps", arguments(__doc__, argv))
    with torch.inference_mode():
        for decoder in bench.few(DECODERS):
            for rows in (1, 4):
                measure(bench, decoder, rows)
    bench.report()


if __name__ == "__main__":
    main()
