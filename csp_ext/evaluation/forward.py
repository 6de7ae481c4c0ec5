"""The decoder's forward for training: one context, many questions, at the price of little more than one.

Every question attends to the context and to itself, and its positions follow the context's, so the result is
that of as many separate sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKED = -1e30


@dataclass(frozen=True)
class Blocks:
    """How a packed sequence is cut.

    Attributes
    ----------
    context : int
        Tokens of the context, which come first.
    questions : tuple of int
        Tokens of each question with its answer, in order.
    """

    context: int
    questions: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the packed sequence."""
        return self.context + sum(self.questions)

    def positions(self) -> Tensor:
        """Return [length] positions; each question's follow the context's."""
        parts = [torch.arange(self.context)]
        return torch.cat(parts + [self.context + torch.arange(count) for count in self.questions])

    def bias(self) -> Tensor:
        """Return [questions, length], 0 where a question's token may attend and `BLOCKED` elsewhere."""
        owner = torch.repeat_interleave(torch.arange(len(self.questions)), torch.tensor(self.questions))
        later = torch.ones(len(owner), len(owner), dtype=torch.bool).triu(1)
        own = (later | (owner[:, None] != owner)).float() * BLOCKED
        return F.pad(own, (self.context, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, H, L, D] by its positions' angles, as Llama does."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def attention_lse(query: Tensor, key: Tensor, rows: Tensor, blocks: Blocks, bias: Tensor) -> Tensor:
    """Return [B, H, R], the log-sum-exp of the attention logits of some rows of the packed sequence."""
    logits = query[:, :, rows] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    position = torch.arange(key.shape[2])
    future = (position > rows[:, None]).float() * BLOCKED
    inside = rows < blocks.context
    future[~inside] = bias[rows[~inside] - blocks.context]
    return (logits + future).logsumexp(-1)


def decode(
    decoder: Any, embedded: Tensor, blocks: Blocks, rows: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run the Llama decoder over packed sequences.

    Parameters
    ----------
    decoder : LlamaModel
        Its weights are used as they are.
    embedded : [B, L, hidden]
        Contexts and questions, all cut in the same way.
    blocks : Blocks
        The cut.
    rows : [R] int64, optional
        Rows of which the log-sum-exp of the attention logits is wanted.

    Returns
    -------
    hidden : [B, L - context, hidden]
        The normed output at the questions' tokens.
    lse : list of [B, heads, R]
        Per layer; empty without `rows`.
    """
    batch, length, _ = embedded.shape
    head_dim = decoder.layers[0].self_attn.head_dim
    cos, sin = decoder.rotary_emb(embedded, blocks.positions()[None])
    cos, sin = cos[:, None], sin[:, None]
    bias = blocks.bias()
    cut = blocks.context
    hidden, lse = embedded, []
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(batch, length, -1, head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if rows is not None:
            lse.append(attention_lse(query, key, rows, blocks, bias))
        asked = F.scaled_dot_product_attention(query[:, :, cut:], key, value, attn_mask=bias)
        if index + 1 < len(decoder.layers):
            told = F.scaled_dot_product_attention(
                query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], is_causal=True
            )
            mixed = torch.cat((told, asked), 2)
        else:
            # Nothing reads the context after the last layer.
            mixed, hidden = asked, hidden[:, cut:]
        mixed = mixed.transpose(1, 2).reshape(batch, mixed.shape[2], -1)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden), lse
