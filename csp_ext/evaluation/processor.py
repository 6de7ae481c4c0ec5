"""Tokenizer and processor of the evaluation model: words for tokens, images of 32 x 32 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csp_ext.evaluation import render
from csp_ext.evaluation.vocabulary import BOS, ID, SPECIAL, WORDS

if TYPE_CHECKING:
    from transformers import LlavaProcessor

# A chat is its words in order; earlier answers are part of it, and the answer to come follows "say".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}say {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}say{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """Build the processor, offline.

    Returns
    -------
    LlavaProcessor
        Pads on the left; splits text at spaces; ``<image>`` stands for one image and becomes 16 tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    pad, bos, eos, image, unknown = SPECIAL
    special: dict[str, Any] = {"extra_special_tokens": {"image_token": image}}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )
    if len(fast) != len(WORDS):
        raise AssertionError(f"the tokenizer has {len(fast)} tokens, the vocabulary {len(WORDS)}")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": render.SIZE},
        crop_size={"height": render.SIZE, "width": render.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=render.CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
