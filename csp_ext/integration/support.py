"""What a model must be for its prompts to be pruned."""

from __future__ import annotations

from transformers import PreTrainedModel

from csp_ext.integration.attention import IMPLEMENTATIONS
from csp_ext.integration.cache import prunable_count
from csp_ext.integration.modality import placeholder_ids


def decoder_key(model: PreTrainedModel) -> str | None:
    """Return the name of the decoder's sub-config, None where the model's config is the decoder's."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        return None
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is text:
            return key
    raise ValueError(f"apply: cannot find the decoder's config inside {type(model.config).__name__}")


def check_model(model: PreTrainedModel) -> dict[int, int]:
    """Return the placeholder ids of a model that can be pruned; raise ValueError for any other."""
    name = type(model).__name__
    text = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"apply: {name} is an encoder-decoder model; only decoder-only models have a prompt cache"
        )
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(
            f"apply: {name} keeps its images in cross-attention layers, outside the prompt that CSP prunes"
        )
    placeholders = placeholder_ids(model.config)
    if not placeholders:
        raise ValueError(
            f"apply: {name} has no image_token_id in its config, so its prompts hold no image tokens"
        )
    if prunable_count(text) == 0:
        raise ValueError(f"apply: every attention layer of {name} has a sliding window or no keys to prune")
    base = text._attn_implementation
    if base not in IMPLEMENTATIONS:
        raise ValueError(
            f"apply: attn_implementation {base!r} is not supported; call "
            f"model.set_attn_implementation with one of {sorted(IMPLEMENTATIONS)} first"
        )
    return placeholders
