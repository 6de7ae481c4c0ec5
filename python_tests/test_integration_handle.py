"""Applying CSP to a model and taking it out again; what is refused, and what the statistics say."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llava_reference import (
    IMAGE_TOKENS,
    assert_batch_equals_rows,
    generate_batch,
    make_row,
    small_llava,
)

transformers = pytest.importorskip("transformers")

from csp_ext.config import CSPConfig
from csp_ext.integration import Handle, apply
from csp_ext.integration.requirement import require_transformers

ROWS = [make_row("5i3i12", 1), make_row("2i20", 2)]
BUDGET = 14


@pytest.fixture(scope="module")
def shared_model() -> Any:
    model = small_llava()
    # The first forward of a kind makes transformers install its own output-capturing hooks.
    model.set_attn_implementation({"text_config": "eager"})
    generate_batch(model, ROWS, 2, output_attentions=True)
    model.set_attn_implementation({"text_config": "sdpa"})
    return model


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """A model that every test must leave as it found it."""
    before = snapshot(shared_model)
    yield shared_model
    assert snapshot(shared_model) == before


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that apply could touch: attributes, hooks, configs, buffers' names."""
    return {
        "attributes": {name: id(value) for name, value in vars(model).items() if not isinstance(value, dict)},
        "names": sorted(vars(model)),
        "modules": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "post_hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "configs": {
            key: json.dumps({k: str(v) for k, v in vars(part).items()}, sort_keys=True)
            for key, part in (
                ("top", model.config),
                ("text", model.config.text_config),
                ("vision", model.config.vision_config),
                ("generation", model.generation_config),
            )
        },
        "generate": model.generate,
    }


def test_restore_leaves_the_model_exactly_as_it_was(model: Any) -> None:
    before = generate_batch(model, ROWS, 4)
    handle = apply(model, budget=BUDGET)
    assert isinstance(handle, Handle)
    assert model.config.text_config._attn_implementation == "csp_sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    generate_batch(model, ROWS, 4)
    handle.restore()
    handle.restore()
    after = generate_batch(model, ROWS, 4)
    assert all(torch.equal(one, two) for one, two in zip(before.logits, after.logits, strict=True))


def test_the_context_manager_restores_after_an_error(model: Any) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), apply(model, budget=BUDGET):
        raise RuntimeError("on purpose")
    # An error inside a forward leaves the model usable too.
    with apply(model, budget=BUDGET), pytest.raises((ValueError, RuntimeError)):
        model.generate(torch.tensor([ROWS[0]]), pixel_values=torch.zeros(5, 3, 28, 28), max_new_tokens=1)
    with apply(model, budget=BUDGET) as handle:
        generate_batch(model, ROWS, 2)
        assert handle.stats.layers[0].kept == BUDGET


def test_apply_is_idempotent(model: Any) -> None:
    first = apply(model, budget=BUDGET)
    second = apply(model, budget=20)
    assert first is second
    assert len(model._forward_pre_hooks) == 1
    generate_batch(model, ROWS, 2)
    assert first.stats.layers[0].kept == 20
    second.restore()
    with apply(model, CSPConfig.paper(), budget=12) as third:
        assert third is not first
        assert third.config == CSPConfig.paper(12)


def test_a_generate_of_the_instance_is_put_back(model: Any) -> None:
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    try:
        with apply(model, budget=BUDGET) as handle:
            generate_batch(model, ROWS, 2)
            assert handle.stats.layers[0].kept == BUDGET
        assert calls == [1]
        assert model.generate is own
    finally:
        del model.generate


def test_eager_and_sdpa_are_remembered(model: Any) -> None:
    for base in ("eager", "sdpa"):
        model.set_attn_implementation({"text_config": base})
        with apply(model, budget=BUDGET):
            assert model.config.text_config._attn_implementation == f"csp_{base}"
        assert model.config.text_config._attn_implementation == base


def test_a_deep_copy_prunes_on_its_own(model: Any) -> None:
    with apply(model, budget=BUDGET) as handle:
        twin = copy.deepcopy(model)
        other = apply(twin)
        assert other is not handle
        assert other.model is twin
        generate_batch(twin, ROWS, 2)
        assert handle.stats.layers == []
    assert twin.config.text_config._attn_implementation == "csp_sdpa"
    other.restore()
    assert "generate" not in vars(twin)


def test_stats(model: Any) -> None:
    with apply(model, budget=BUDGET) as handle:
        assert handle.stats.layers == []
        generate_batch(model, ROWS, 3)
    stats = handle.stats
    assert [layer.layer for layer in stats.layers] == [0, 1]
    for layer in stats.layers:
        assert layer.indices.shape == (2, 2, BUDGET)
        assert layer.indices.device.type == "cpu"
        assert layer.kept == BUDGET
        assert layer.dropped == sum(map(len, ROWS)) / 2 - BUDGET
        images = [
            [int(padded[position]) == 3 for position in layer.indices[row, head]]
            for row, padded in enumerate([ROWS[0], [0] * (len(ROWS[0]) - len(ROWS[1])) + ROWS[1]])
            for head in range(2)
        ]
        kept_images = sum(map(sum, images))
        assert layer.share_kept(1) == pytest.approx(kept_images / (2 * 3 * IMAGE_TOKENS))
        words = sum(map(len, ROWS)) - 3 * IMAGE_TOKENS
        assert layer.share_kept(0) == pytest.approx((4 * BUDGET - kept_images) / (2 * words))
        assert layer.share_kept(2) is None
    values = stats.to_dict()
    assert values["bytes_after"] == sum(layer["bytes_after"] for layer in values["layers"])
    assert json.loads(json.dumps(values)) == values
    table = str(stats)
    assert "image kept" in table
    assert "freed" in table


def test_two_generations_share_nothing(model: Any) -> None:
    config = CSPConfig(budget=BUDGET, decode_n=1.0)
    with apply(model, config):
        first = generate_batch(model, ROWS, 4)
        stored = [layer.keys.clone() for layer in first.past_key_values.layers]
        generate_batch(model, [make_row("4i9", 8), make_row("i2i30", 9)], 4)
        again = generate_batch(model, ROWS, 4)
    for layer, keys in zip(first.past_key_values.layers, stored, strict=True):
        assert torch.equal(layer.keys, keys)
    assert all(torch.equal(one, two) for one, two in zip(first.logits, again.logits, strict=True))


def test_threads(model: Any) -> None:
    batches = [[make_row(f"{3 + k}i{9 + k}", k)] for k in range(4)]
    config = CSPConfig(budget=BUDGET, decode_n=1.0)
    outputs: dict[int, Any] = {}
    with apply(model, config):

        def work(index: int) -> None:
            outputs[index] = generate_batch(model, batches[index], 5)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, rows in enumerate(batches):
        assert_batch_equals_rows(model, outputs[index], rows, config, BUDGET)


def test_training_is_untouched(model: Any) -> None:
    ids = torch.tensor([make_row("20", 3)])
    model.train()
    try:
        with apply(model, budget=5) as handle:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            assert handle.stats.layers == []
        assert model.lm_head.weight.grad is not None
    finally:
        model.zero_grad()
        model.eval()


def test_no_cache_means_nothing_to_prune(model: Any) -> None:
    whole = generate_batch(model, ROWS, 3, use_cache=False)
    with apply(model, budget=BUDGET) as handle, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = generate_batch(model, ROWS, 3, use_cache=False)
        assert handle.stats.layers == []
    assert torch.equal(whole.sequences, same.sequences)


def test_output_attentions(model: Any) -> None:
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with apply(model, budget=BUDGET):
            output = generate_batch(model, ROWS, 3, output_attentions=True)
        assert output.attentions[0][0].shape == (2, 4, len(ROWS[0]), len(ROWS[0]))
        assert output.attentions[1][0].shape == (2, 4, 1, BUDGET + 1)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


# --- refusals ------------------------------------------------------------------------------


def refused(model: Any, match: str, error: type[Exception] = ValueError, **fields: Any) -> None:
    names = sorted(vars(model)) if hasattr(model, "__dict__") else None
    with pytest.raises(error, match=match):
        apply(model, **fields)
    if names is not None:
        assert sorted(vars(model)) == names


def small_text_config(cls: Any, **fields: Any) -> Any:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return cls(**{**sizes, **fields})


def test_refuses_what_is_not_a_model(model: Any) -> None:
    refused(torch.nn.Linear(2, 2), "PreTrainedModel, got Linear", TypeError)
    refused("llava", "got str", TypeError)
    with pytest.raises(TypeError, match="must be a CSPConfig"):
        apply(model, 0.2)  # type: ignore[arg-type]


def test_says_when_no_forward_was_seen(model: Any) -> None:
    def echo(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids

    with apply(model, budget=BUDGET), pytest.warns(UserWarning, match="no forward of the whole model"):
        model.generate(torch.tensor([make_row("20")]), custom_generate=echo, max_new_tokens=2)


def test_refuses_shared_heads_under_tensor_parallelism(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_tp_size", 2, raising=False)
    refused(model, "tensor parallelism", heads="shared")


def test_refuses_an_old_transformers() -> None:
    require_transformers("5.4.0")
    require_transformers("6.0.0.dev0")
    with pytest.raises(ImportError, match=r"needs transformers 5\.4 or newer, 5\.3\.1"):
        require_transformers("5.3.1")


def test_refuses_wrong_fields(model: Any) -> None:
    refused(model, "budget", budget=1.5)
    refused(model, "budget", TypeError, budget="much")
    with pytest.raises((TypeError, ValueError), match="bugdet"):
        apply(model, bugdet=0.2)
    with pytest.raises(ValueError, match="budget"):
        apply(model, CSPConfig(), budget=0)


def test_refuses_a_model_without_image_tokens() -> None:
    text = transformers.LlamaForCausalLM(small_text_config(transformers.LlamaConfig))
    refused(text, "image_token_id")


def test_refuses_an_all_sliding_model() -> None:
    text = small_text_config(transformers.MistralConfig, sliding_window=8)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    refused(transformers.LlavaForConditionalGeneration(config), "sliding window")


def test_refuses_cross_attention() -> None:
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1],
            "pad_token_id": 0,
        },
        image_token_index=3,
    )
    refused(transformers.MllamaForConditionalGeneration(config), "cross-attention")


def test_refuses_an_encoder_decoder() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    refused(transformers.T5ForConditionalGeneration(config), "encoder-decoder")


def test_refuses_a_foreign_attention(model: Any) -> None:
    model.config.text_config._attn_implementation_internal = "flex_attention"
    try:
        refused(model, "'flex_attention' is not supported")
    finally:
        model.config.text_config._attn_implementation_internal = "sdpa"


def test_refuses_a_model_that_does_not_look_up_its_attention(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(model.model.language_model), "_can_set_attn_implementation", classmethod(lambda cls: False)
    )
    refused(model, "AttentionInterface")
    assert model.config.text_config._attn_implementation == "sdpa"
