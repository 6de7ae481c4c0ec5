"""A LLaVA with random weights and its processor, built offline: small enough for tests.

The architecture is the real one (CLIP tower, projector, Llama decoder), so everything that works here works
on a downloaded checkpoint; only the answers mean nothing. Nothing is downloaded, torchvision is not needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["IMAGE_TOKEN_ID", "build_tiny_llava", "build_tiny_processor", "save_tiny_llava"]

# The tokenizer gives its special tokens the first ids, in this order.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, IMAGE_TOKEN_ID = range(4)
VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

CORPUS = (
    "USER: What is in the picture? ASSISTANT: The picture shows a cat and a dog on the grass.",
    "USER: Describe the image in detail. ASSISTANT: There are two people in front of the house.",
    "USER: How many images are there and what is the difference between them?",
    "ASSISTANT: The answer is that the colour of the left image is red and the right one is blue.",
)


def build_tiny_llava(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    image_size: int = 168,
    patch_size: int = 14,
    vocab_size: int = VOCAB_SIZE,
    attention_gain: float = 2.0,
    logit_gain: float = 3.0,
) -> LlavaForConditionalGeneration:
    """Build a small LLaVA with random weights.

    Parameters
    ----------
    seed : int
        Seed of the weights; the global generator is left as it was.
    dtype : torch.dtype
        Type of every parameter.
    num_layers, num_heads, num_kv_heads, head_dim : int
        Shape of the decoder; ``num_kv_heads < num_heads`` is grouped-query attention.
    image_size, patch_size : int
        An image becomes ``(image_size // patch_size) ** 2`` tokens, a square grid in row-major order.
    vocab_size : int
        Rows of the embedding; at least the number of tokens of :func:`build_tiny_processor` (384).
    attention_gain, logit_gain : float
        Spread of the attention and output logits: large enough that dropping a key shows in the answer.

    Returns
    -------
    LlavaForConditionalGeneration
        In evaluation mode. Its generation has no end-of-sequence token, so lengths are what was asked for.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    hidden_size = num_heads * head_dim
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
        pad_token_id=PAD_TOKEN_ID,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(image_size // patch_size) ** 2,
    )
    # Building draws from the global generator; fork it so that callers see no side effect.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    _randomise(model, seed, attention_gain, logit_gain)
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    model.generation_config.bos_token_id = BOS_TOKEN_ID
    module: torch.nn.Module = model
    module.to(dtype).eval()
    return model


def _randomise(model: torch.nn.Module, seed: int, attention_gain: float, logit_gain: float) -> None:
    """Draw every matrix with unit output variance, times a gain for the logits that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        gain = 1.0
        if "language_model" in name and ("q_proj" in name or "k_proj" in name):
            gain = math.sqrt(attention_gain)
        elif "lm_head" in name:
            gain = logit_gain
        is_table = "embed_tokens" in name or "position_embedding" in name
        fan_in = 1 if is_table else parameter[0].numel()
        values = torch.randn(parameter.shape, generator=generator) * (gain / math.sqrt(fan_in))
        with torch.no_grad():
            parameter.copy_(values)


def build_tiny_processor(*, image_size: int = 168, patch_size: int = 14) -> LlavaProcessor:
    """Build the processor of :func:`build_tiny_llava`: byte-level BPE, CLIP images, a chat template.

    Parameters
    ----------
    image_size, patch_size : int
        The same as the model's.

    Returns
    -------
    LlavaProcessor
        Pads on the left; ``<image>`` stands for one image and is expanded to its number of patches.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_TOKEN_ID)]
    )
    special: dict[str, Any] = {"extra_special_tokens": {"image_token": "<image>"}}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        **special,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_llava(
    folder: str | Path, seed: int = 0, *, image_size: int = 168, patch_size: int = 14, **fields: Any
) -> Path:
    """Write model and processor into `folder`, where ``from_pretrained`` and ``pipeline`` find them.

    Parameters
    ----------
    folder : str or Path
        Created where absent.
    seed, image_size, patch_size, **fields
        As for :func:`build_tiny_llava`.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    model = build_tiny_llava(seed, image_size=image_size, patch_size=patch_size, **fields)
    model.save_pretrained(folder)
    build_tiny_processor(image_size=image_size, patch_size=patch_size).save_pretrained(folder)
    return folder
