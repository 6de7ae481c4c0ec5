"""What a pruned generation must equal: a hand-written LLaVA loop that keeps every key and masks the dropped.

One row at a time, without padding. Weights are the model's; masks, cache, positions, window and n-softmax are
written out here, so nothing of transformers' generation or of the integration is relied on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csp_ext import reference
from csp_ext.config import CSPConfig


@dataclass
class RowResult:
    """One row's generation: logits [steps, V], tokens [steps], kept positions per layer bool [Hs, L]."""

    logits: Tensor
    tokens: list[int]
    kept: list[Tensor]


def question_window(modality: list[int]) -> list[int]:
    """Positions of the "question" window: the text after the last image, at most 64; 8 after an image."""
    length = len(modality)
    images = [j for j, kind in enumerate(modality) if kind > 0]
    start = images[-1] + 1 if images else 0
    if start == length:
        return list(range(max(0, length - 8), length))
    return list(range(max(start, length - 64), length))


def kept_positions(
    query: Tensor, key: Tensor, modality: list[int], config: CSPConfig, budget: int, scale: float
) -> Tensor:
    """Return the prompt positions one layer keeps, bool [Hs, L], by the twins of ``score`` and ``select``."""
    length = len(modality)
    sizes = (
        config.resolve(length)
        if config.hh_ratio is not None
        else config.replace(budget=budget).resolve(length)
    )
    heads = key.shape[0] if config.heads == "kv" else 1
    kept = torch.ones(heads, length, dtype=torch.bool, device=key.device)
    if length < sizes.prune_from or (config.text_only == "leave" and max(modality) == 0):
        return kept
    positions = question_window(modality)
    if sizes.window != "question":
        assert isinstance(sizes.window, int)
        positions = list(range(max(0, length - sizes.window), length))
    kinds = torch.tensor([modality], dtype=torch.int8, device=key.device)
    observing = kinds[:, positions[0] :]
    scores = reference.score(
        query[None, :, positions[0] :],
        key[None],
        kinds,
        query_modality=observing,
        n=config.n,
        scale=scale,
        heads=config.heads,
    )
    options = sizes.select_options()
    divided = config.combine == "calibrated" and config.cross_ratio is None
    if divided:
        scores = (scores[0] + scores[1],) * 2
    if divided or sizes.hop:
        # Both lists are open to every key.
        observing, options["causal"] = kinds, False
    if sizes.hop:
        asked = hop_positions(
            scores, kinds, observing if divided else kinds[:, positions[0] :], sizes, divided
        )
        hop = reference.score(
            query[None, :, asked],
            key[None],
            kinds,
            query_modality=kinds[:, asked],
            n=config.n,
            scale=scale,
            heads=config.heads,
            causal=False,
        )
        extra = of_candidates(hop[0] + hop[1], sizes.recent)
        scores = tuple(of_candidates(score, sizes.recent) + extra for score in scores)
    indices, _ = reference.select(*scores, kinds, observing, **options)
    kept[:] = False
    for head, chosen in enumerate(indices[0]):
        kept[head, chosen[chosen >= 0].long()] = True
    return kept


def of_candidates(score: Tensor, recent: int) -> Tensor:
    """Divide [1, Hs, L] by its sum over all but the `recent` last; those get 0."""
    candidates = score.clone()
    candidates[..., score.shape[-1] - recent :] = 0
    return candidates / candidates.sum(-1, keepdim=True).clamp_min(1e-300)


def hop_positions(
    scores: tuple[Tensor, Tensor], kinds: Tensor, observing: Tensor, sizes: Any, divided: bool
) -> list[int]:
    """Positions of the tokens that are asked in turn: the best of all heads together."""
    means = [of_candidates(score, sizes.recent).mean(1, keepdim=True) for score in scores]
    options = sizes.select_options() | {"budget": sizes.hop + sizes.recent, "k_self": None, "k_cross": None}
    chosen, _ = reference.select(*means, kinds, observing, causal=not divided, **options)
    real = chosen[0, 0][chosen[0, 0] >= 0].tolist()
    return real[: len(real) - sizes.recent] if sizes.recent else real


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class RowReference:
    """A LLaVA with a full cache for one unpadded row; prompt keys a layer dropped are masked in decode."""

    def __init__(self, model: Any, config: CSPConfig | None, budget: int) -> None:
        self.model, self.config, self.budget = model, config, budget
        self.decoder = model.model.language_model
        layers = len(self.decoder.layers)
        self.keys: list[Tensor | None] = [None] * layers  # [Hkv, S, D]
        self.values: list[Tensor | None] = [None] * layers
        self.kept: list[Tensor | None] = [None] * layers  # [Hkv, L]
        self.dropped: list[Tensor | None] = [None] * layers  # bool [Hs]
        self.queries: list[Tensor | None] = [None] * layers  # [Hq, S, D]
        self.modality: list[int] = []

    @torch.no_grad()
    def feed(self, ids: list[int], pixels: Tensor | None = None, *, prune: bool = False) -> Tensor:
        """Append tokens and return their logits [q, V]; with `prune`, every layer then drops keys."""
        model, decoder = self.model, self.decoder
        image_id = model.config.image_token_index
        tokens = torch.tensor([ids], device=model.device)
        hidden = decoder.embed_tokens(tokens)[0]
        if pixels is not None:
            pixels = pixels.to(model.device)
            features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
            hidden[tokens[0] == image_id] = torch.cat(list(features)).to(hidden.dtype)
        past = len(self.modality)
        # A placeholder that was generated is a word like any other.
        self.modality += [int(token == image_id and pixels is not None) for token in ids]
        positions = torch.arange(past, past + len(ids), device=model.device)[None]
        cos, sin = decoder.rotary_emb(hidden[None], positions)
        for index, layer in enumerate(decoder.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attention(index, layer.self_attn, normed, cos[0], sin[0], past, prune)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.lm_head(decoder.norm(hidden))

    def _attention(
        self, index: int, attn: Any, x: Tensor, cos: Tensor, sin: Tensor, past: int, prune: bool
    ) -> Tensor:
        count, dim = x.shape[0], attn.head_dim
        query = _rotate(attn.q_proj(x).view(count, -1, dim).transpose(0, 1), cos, sin)
        key = _rotate(attn.k_proj(x).view(count, -1, dim).transpose(0, 1), cos, sin)
        value = attn.v_proj(x).view(count, -1, dim).transpose(0, 1)
        if self.keys[index] is not None:
            key = torch.cat([self.keys[index], key], dim=1)
            value = torch.cat([self.values[index], value], dim=1)
        self.keys[index], self.values[index] = key, value
        known = self.queries[index]
        self.queries[index] = query if known is None else torch.cat([known, query], dim=1)
        group = query.shape[0] // key.shape[0]
        stored = key.shape[1]
        slots = torch.arange(stored, device=x.device)
        visible = slots[None, :] <= slots[past:, None]  # [q, S]
        visible = visible.expand(query.shape[0], -1, -1).clone()
        kept = self.kept[index]
        if kept is not None:
            per_head = kept.expand(key.shape[0], -1).repeat_interleave(group, dim=0)
            visible[:, :, : kept.shape[1]] &= per_head[:, None]
        scale = 1 / math.sqrt(dim)
        logits = query @ key.repeat_interleave(group, dim=0).transpose(1, 2) * scale
        logits = logits.masked_fill(~visible, -torch.inf)
        weights = reference.n_softmax(logits, 0.0)
        dropped = self.dropped[index]
        if dropped is not None:
            per_head = dropped.expand(key.shape[0]).repeat_interleave(group)[:, None, None]
            smoothed = reference.n_softmax(logits, self.config.decode_n)
            weights = torch.where(per_head, smoothed, weights)
        weights = weights.to(value.dtype)
        out = weights @ value.repeat_interleave(group, dim=0)
        if prune and self.config is not None:
            chosen = kept_positions(self.queries[index], key, self.modality, self.config, self.budget, scale)
            self.kept[index] = chosen
            self.dropped[index] = ~chosen.all(-1)
        return attn.o_proj(out.transpose(0, 1).reshape(count, -1))

    @torch.no_grad()
    def prune_again(self, run: int) -> None:
        """Have every layer drop stored keys until the budget holds; its `run` last ones are without gaps."""
        assert self.config is not None
        sizes = self.config.replace(budget=self.budget).resolve(self.budget)
        options = sizes.select_options()
        device = self.model.device
        kinds = torch.tensor(self.modality, dtype=torch.int8, device=device)
        shared = self.config.heads == "shared"
        for index, (query, key) in enumerate(zip(self.queries, self.keys, strict=True)):
            assert query is not None
            assert key is not None
            group, total = query.shape[0] // key.shape[0], key.shape[1]
            kept = torch.ones(1 if shared else key.shape[0], total, dtype=torch.bool, device=device)
            before = self.kept[index]
            assert before is not None
            kept[:, : before.shape[1]] = before.expand(kept.shape[0], -1)
            for head in range(kept.shape[0]):
                places = kept[head].nonzero()[:, 0]
                stored = kinds[places][None]
                watched = min(run, len(places))
                if sizes.window == "question":
                    watched = min(watched, len(question_window(stored[0].tolist())))
                else:
                    watched = min(watched, sizes.window)
                own = slice(None) if shared else slice(head * group, (head + 1) * group)
                keys = key[:, places] if shared else key[head : head + 1, places]
                scores = reference.score(
                    query[None, own, total - watched :],
                    keys[None],
                    stored,
                    query_modality=stored[:, len(places) - watched :],
                    n=self.config.n,
                    scale=key.shape[2] ** -0.5,
                    heads=self.config.heads,
                )
                observing, causal = stored[:, len(places) - watched :], True
                if self.config.combine == "calibrated" and self.config.cross_ratio is None:
                    scores, observing, causal = (scores[0] + scores[1],) * 2, stored, False
                chosen, _ = reference.select(*scores, stored, observing, causal=causal, **options)
                chosen = chosen[0, 0][chosen[0, 0] >= 0].long()
                kept[head] = False
                kept[head, places[chosen]] = True
            self.kept[index] = kept
            self.dropped[index] = ~kept.all(-1)


def generate_row(
    model: Any,
    ids: list[int],
    pixels: Tensor | None,
    config: CSPConfig | None,
    budget: int,
    steps: int,
    forced: list[int] | None = None,
) -> RowResult:
    """Generate greedily from one unpadded row, or follow the tokens of `forced`."""
    row = RowReference(model, config, budget)
    logits = [row.feed(ids, pixels, prune=True)[-1]]
    tokens: list[int] = []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()) if forced is None else forced[step])
        if step + 1 < steps:
            logits.append(row.feed(tokens[-1:])[-1])
    return RowResult(torch.stack(logits), tokens, [kept for kept in row.kept if kept is not None])


# --- prompts -------------------------------------------------------------------------------

IMAGE = 3
IMAGE_SIZE, PATCH_SIZE, IMAGE_TOKENS = 28, 7, 16


def small_llava(seed: int = 0, **fields: Any) -> Any:
    """Build a tiny LLaVA with 16 tokens per image."""
    from csp_ext.tiny_llava import build_tiny_llava

    return build_tiny_llava(seed, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **fields)


def make_row(layout: str, seed: int = 0) -> list[int]:
    """Return token ids for a layout such as "5i3i12": 5 words, an image, 3 words, an image, 12 words."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for piece in layout.replace("i", " i ").split():
        if piece == "i":
            ids += [IMAGE] * IMAGE_TOKENS
        else:
            ids += torch.randint(4, 384, (int(piece),), generator=generator).tolist()
    return ids


def make_pixels(rows: list[list[int]], dtype: torch.dtype, seed: int = 7) -> Tensor | None:
    """Return random images [N, 3, 28, 28] for all the image tokens of a batch, in order, or None."""
    count = sum(row.count(IMAGE) for row in rows) // IMAGE_TOKENS
    if count == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)


def split_pixels(rows: list[list[int]], pixels: Tensor | None) -> list[Tensor | None]:
    """Return each row's own images."""
    found: list[Tensor | None] = []
    start = 0
    for row in rows:
        count = row.count(IMAGE) // IMAGE_TOKENS
        found.append(pixels[start : start + count] if pixels is not None and count else None)
        start += count
    return found


def pad_batch(rows: list[list[int]], gaps: list[list[tuple[int, int]]] | None = None) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, padded on the left.

    `gaps` gives (position, count) pairs of padding per row instead, wherever it should stand.
    """
    length = max(len(row) for row in rows)
    if gaps is None:
        gaps = [[(0, length - len(row))] for row in rows]
    ids, mask = [], []
    for row, holes in zip(rows, gaps, strict=True):
        padded, real = list(row), [1] * len(row)
        for position, count in sorted(holes, reverse=True):
            padded[position:position] = [0] * count
            real[position:position] = [0] * count
        ids.append(padded)
        mask.append(real)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_logits_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare as DESIGN section 7 says: 1e-6 in float64, 1e-5 of the largest logit in float32."""
    limit = 1e-6 if dtype == torch.float64 else 1e-5 * float(expected.abs().max())
    worst = float((actual.double() - expected.double()).abs().max())
    assert worst <= limit, f"logits differ by {worst:.2e}, allowed {limit:.2e}"


def generate_batch(model: Any, rows: list[list[int]], steps: int, **options: Any) -> Any:
    """Run generate on a left-padded batch, greedily unless told otherwise, and return its full output."""
    pixels = make_pixels(rows, model.dtype)
    inputs = pad_batch(rows) | ({} if pixels is None else {"pixel_values": pixels})
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, max_new_tokens=steps, **settings)


def assert_batch_equals_rows(
    model: Any, output: Any, rows: list[list[int]], config: CSPConfig | None, budget: int, repeats: int = 1
) -> None:
    """Every generated row equals the reference of that row alone, following the tokens it generated."""
    steps = len(output.logits)
    images = split_pixels(rows, make_pixels(rows, model.dtype))
    logits = torch.stack(output.logits, dim=1)
    for index in range(logits.shape[0]):
        row = index // repeats
        forced = output.sequences[index, -steps:].tolist()
        expected = generate_row(model, rows[row], images[row], config, budget, steps, forced)
        assert_logits_close(logits[index], expected.logits, model.dtype)
