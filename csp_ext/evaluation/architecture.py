"""The evaluation model before training: an ordinary LLaVA whose decoder starts out looking where it should.

A transformer this small spends most of its training finding out that it should look at the previous word and
at the latest name. Here it starts with that: two heads of the first layer attend to the previous word and the
one before it, two to the latest source and name, and the heads of the later layers to tokens that carry the
query's source and name and follow (or show) the query's word. Everything is trained from there. At inference
it is a Llama like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csp_ext.evaluation import render
from csp_ext.evaluation.vocabulary import BOS, EOS, IMAGE, NAMES, PAD, SOURCES, WORDS, first

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

HIDDEN = 128
HEAD_DIM = 32
HEADS = 4
LAYERS = 4
ROPE_THETA = 1e7

# Lengths of the directions in an embedding: the word's own, the one all share, that of names and sources.
WORD, SHARED, NAMING = 1.0, 2.0, 1.0
# A head's dimensions are pairs that turn with position: pair j by ROPE_THETA^(-j/16) radians per token.
PAIRS = HEAD_DIM // 2
NEAR_PAIRS, NEAR_LOGITS, NEAR_OFFSET = range(4), (8.0, 5.0, 3.0, 2.0), 14.0
RECENT_PAIRS, RECENT_LOGITS, RECENT_OFFSET = range(2, 7), (3.0, 6.0, 12.0, 12.0, 6.0), 20.0
RECENT_PHASE = 0.6
CONTENT_PAIRS = range(7, PAIRS)
# Logit of a full match in the heads that look for what follows the query's word, and for the word itself.
FOLLOWING, SAME = 3.0, 1.0
COPY = 1.0
SMALL = 0.02
# Size of a unit direction after a layer's norm, for an embedding of the lengths above.
NORMED = HIDDEN**0.5 / (WORD**2 + SHARED**2) ** 0.5


def build_model(seed: int, num_kv_heads: int = HEADS) -> LlavaForConditionalGeneration:
    """Build the model with its initial weights, in float32.

    Parameters
    ----------
    seed : int
        The global generator is left as it was.
    num_kv_heads : int
        4, or 2 for grouped-query attention.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=render.SIZE,
        patch_size=render.CELL,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=render.CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    _initialise(model.model.language_model, model.lm_head, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _initialise(decoder: Any, head: Any, generator: torch.Generator) -> None:
    count = len(WORDS)
    basis = _orthonormal(HIDDEN, HIDDEN, generator)
    words, shared, naming = basis[:count], basis[count], basis[count + 1]
    table = WORD * words + SHARED * shared
    for kind in (NAMES, SOURCES):
        table[first(kind) : first(kind) + len(kind)] += NAMING * naming
    decoder.embed_tokens.weight.copy_(table)
    head.weight.copy_(words)

    read = _orthonormal(HEAD_DIM, count, generator) @ words
    # What the first layer writes: all but the directions its heads steer by.
    room = torch.cat((words, basis[count + 2 :]))
    previous, before, reference = (_orthonormal(HEAD_DIM, len(room), generator) @ room for _ in range(3))
    for layer in decoder.layers:
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, SMALL, generator=generator)

    query, key, value, out = _heads(decoder.layers[0].self_attn)
    write = (count / HEAD_DIM) ** 0.5 / NORMED
    near_key, near_query = _turning(shared, shared, NEAR_PAIRS, NEAR_LOGITS, NEAR_OFFSET)
    recent_key, recent_query = _turning(naming, shared, RECENT_PAIRS, RECENT_LOGITS, RECENT_OFFSET)
    for h in range(HEADS):
        group = h * len(key) // HEADS
        if h < 2:
            key[group] = near_key
            query[h] += near_query(-(h + 1.0), 0.0)
        else:
            key[group] = recent_key
            query[h] += recent_query(0.0, RECENT_PHASE)
        value[group] = read
        out[h] += write * (previous, before, reference, 0.5 * reference)[h]

    words_mixed, reference_mixed = (_orthonormal(HEAD_DIM, HEAD_DIM, generator) for _ in range(2))
    copied = _orthonormal(count, count, generator) @ words
    for index, layer in enumerate(decoder.layers[1:]):
        query, key, value, out = _heads(layer.self_attn)
        for h in range(HEADS):
            group = h * len(key) // HEADS
            shown, gain = (previous, FOLLOWING**0.5) if h < HEADS // 2 else (read, SAME**0.5)
            query[h] += gain * _content(words_mixed @ read + reference_mixed @ reference)
            key[group] = gain * _content(words_mixed @ shown + reference_mixed @ reference)
            part = copied[(torch.arange(HEAD_DIM) + HEAD_DIM * (group + index)) % count]
            value[group] = part
            out[h] += COPY / NORMED * part


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return `rows` random orthonormal vectors."""
    square = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return square[:rows]


def _heads(attention: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of query, key, value and output as views, [heads, HEAD_DIM, HIDDEN] each."""
    query, key, value = (
        projection.weight.view(-1, HEAD_DIM, HIDDEN)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = attention.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM).permute(1, 2, 0)
    return query, key, value, out


def _turning(
    kind: Tensor, shared: Tensor, pairs: range, logits: tuple[float, ...], offset: float
) -> tuple[Tensor, Callable[[float, float], Tensor]]:
    """Return the key weights and a maker of query weights of a head that attends to a kind by distance.

    Pair j adds ``logits[j] * cos(turn_j * (distance + per_turn) + fixed)``; the slowest pair subtracts
    `offset`, which keeps the log-sum-exp of the row small.
    """
    scale = HEAD_DIM**0.25 / NORMED
    key, query_plain = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
    key[PAIRS - 1] = scale / SHARED * offset**0.5 * shared
    query_plain[PAIRS - 1] = -scale / SHARED * offset**0.5 * shared
    # The shared direction is longer than the others by its length in the embedding.
    key_scale = scale / (SHARED if kind is shared else NAMING)
    for pair, logit in zip(pairs, logits, strict=True):
        key[pair] = key_scale * logit**0.5 * kind

    def query(per_turn: float, fixed: float) -> Tensor:
        made = query_plain.clone()
        for pair, logit in zip(pairs, logits, strict=True):
            phase = per_turn * ROPE_THETA ** (-pair / PAIRS) + fixed
            amplitude = scale / SHARED * logit**0.5
            made[pair] = amplitude * math.cos(phase) * shared
            made[pair + PAIRS] = amplitude * math.sin(phase) * shared
        return made

    return key, query


def _content(rows: Tensor) -> Tensor:
    """Return `rows` with only the dimensions that hardly turn."""
    kept = torch.zeros_like(rows)
    for pair in CONTENT_PAIRS:
        kept[pair], kept[pair + PAIRS] = rows[pair], rows[pair + PAIRS]
    return kept
