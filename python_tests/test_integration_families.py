"""Other families: a pruned generation equals a stock one in which every layer hides the keys it dropped.

The kept sets are taken from the handle; what is tested is that each family's masks, positions and cache fit.
"""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from csp_ext.integration import apply
from csp_ext.integration.cache import pruned_layers

IMAGE = 5
VOCAB = 64
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


def mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def llava_next() -> Any:
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP),
            text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[28, 28]],
        )
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**CLIP),
            text_config=transformers.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=6,
            image_grid_pinpoints=[[28, 28]],
        )
    )


def internvl() -> Any:
    vision = {**CLIP, "image_size": [28, 28], "patch_size": [14, 14]}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**vision),
            text_config=transformers.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
        )
    )


def idefics3() -> Any:
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(
            vision_config={**CLIP, "model_type": "idefics3_vision"},
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
        )
    )


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
    }
    text = {**TEXT, "rope_parameters": mrope([2, 1, 1])}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            video_token_id=6,
            vision_start_token_id=7,
        )
    )


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": 8}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4
        )
    )


def paligemma() -> Any:
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**CLIP),
            text_config=transformers.GemmaConfig(**TEXT),
            image_token_index=IMAGE,
            projection_dim=32,
        )
    )


FAMILIES = [llava_next, llava_onevision, internvl, idefics3, qwen2_5_vl, gemma3, paligemma]


class Oracle:
    """A stock attention that hides, from single queries, the prompt keys that a layer dropped."""

    def __init__(self) -> None:
        self.hidden: dict[int, Tensor] = {}  # per layer bool [B, Hkv, L]

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        hidden = self.hidden.get(getattr(module, "layer_idx", -1))
        if hidden is not None and query.shape[2] == 1:
            rows, heads = query.shape[:2]
            visible = torch.ones(rows, heads, 1, key.shape[2], dtype=torch.bool)
            if mask is not None:
                visible &= mask
            visible[:, :, 0, : hidden.shape[2]] &= ~hidden.repeat_interleave(heads // hidden.shape[1], dim=1)
            mask = visible
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    instance = Oracle()
    transformers.AttentionInterface.register("oracle", instance)
    transformers.AttentionMaskInterface.register("oracle", sdpa_mask)
    return instance


def spread(model: Any) -> Any:
    """Random weights under which a dropped key changes the answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = 1 if "embed" in name else parameter[0].numel()
                scale = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / math.sqrt(fan_in))
    return model.to(torch.float64).eval()


def batch() -> dict[str, Tensor]:
    """Two left-padded prompts with placeholders; without pixels a model embeds those as words."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCAB, (2, 36), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 6:22] = IMAGE
    ids[1, 14:26] = IMAGE
    ids[1, :7], mask[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, max_new_tokens=6, **options)


def assert_growing_caches_agree(
    model: Any, inputs: dict[str, Tensor], caches: list[dict[str, Any]], budget: int
) -> None:
    """Pruned again within the answer: every cache and attention the same."""
    found = []
    for attention in (None, "csp"):
        for options in caches:
            with apply(model, budget=budget, decode_interval=2, attention=attention) as handle:
                output = generate(model, inputs, **options)
            assert handle.stats.renewals == 2
            assert all(layer.written() <= budget + 2 for layer in pruned_layers(output.past_key_values))
            found.append(output.logits)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=1e-6)


def assert_pruned_like_the_oracle(model: Any, inputs: dict[str, Tensor], oracle: Oracle, budget: int) -> Any:
    whole = generate(model, inputs)
    with apply(model, budget=budget) as handle:
        pruned = generate(model, inputs)
    caches: list[dict[str, Any]] = [{}]
    static = {"cache_implementation": "static", "disable_compile": True}
    # The 5.4 of transformers cannot make PaliGemma's mask for a static cache of its own either.
    with contextlib.suppress(IndexError):
        generate(model, inputs, **static)
        caches.append(static)
    with apply(model, budget=budget, attention="csp"):
        for options in caches:
            same = generate(model, inputs, **options)
            torch.testing.assert_close(same.logits, pruned.logits, rtol=0, atol=1e-6)
    assert_growing_caches_agree(model, inputs, caches, budget)
    real = inputs["attention_mask"].bool()
    oracle.hidden = {}
    for layer in handle.stats.layers:
        indices = layer.indices.long()
        assert (layer.lengths == budget).all()
        kept = torch.zeros(*indices.shape[:2], real.shape[1], dtype=torch.bool).scatter(2, indices, True)
        oracle.hidden[layer.layer] = ~kept
    key = next(
        k for k in model.config.sub_configs if getattr(model.config, k) is model.config.get_text_config()
    )
    model.set_attn_implementation({key: "oracle"})
    expected = generate(model, inputs)
    model.set_attn_implementation({key: "sdpa"})
    assert torch.equal(pruned.sequences, expected.sequences)
    worst = max(float((a - b).abs().max()) for a, b in zip(pruned.logits, expected.logits, strict=True))
    assert worst < 1e-6
    moved = max(float((a - b).abs().max()) for a, b in zip(pruned.logits[1:], whole.logits[1:], strict=True))
    assert moved > 1e-3, "pruning should show"
    return handle


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_family(family: Any, oracle: Oracle) -> None:
    model = spread(family())
    inputs = batch()
    if family is qwen2_5_vl:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 6, 8]])
        inputs["pixel_values"] = torch.randn(
            64 + 48, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)
        )
    if family is gemma3:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    handle = assert_pruned_like_the_oracle(model, inputs, oracle, budget=12)
    assert [layer.layer for layer in handle.stats.layers] == ([1] if family is gemma3 else [0, 1, 2])
