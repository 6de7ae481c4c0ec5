"""From photographs and words to the tensors of a prompt, and from its image tokens back to patches."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csp_ext.demo.console import UserError, first_line
from csp_ext.demo.photographs import Photograph

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for ``generate``.

    Attributes
    ----------
    inputs : mapping
        What the processor returned, on the model's device.
    modality : Tensor
        [L] int8 on the CPU: 0 text, 1 image, further ids for other modalities.
    photographs : list of Photograph
        In the order of the prompt.
    """

    inputs: Any
    modality: Tensor
    photographs: list[Photograph]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.modality.numel()

    @property
    def image_tokens(self) -> int:
        """Image tokens of the prompt, all photographs together."""
        return int((self.modality == 1).sum())

    @property
    def text_tokens(self) -> int:
        """Text tokens of the prompt."""
        return int((self.modality == 0).sum())


def written(processor: Any, text: str, images: int) -> str | Messages:
    """Read the user's prompt.

    Text that holds the image token is taken as it is, JSON as a list of chat messages; any other text is a
    question that the images come before.

    Parameters
    ----------
    processor : ProcessorMixin
        Its image token and chat template decide.
    text : str
        The prompt.
    images : int
        How many images go with it.
    """
    token = getattr(processor, "image_token", None)
    if token and token in text:
        found = text.count(token)
        if found != images:
            raise UserError(f"the prompt holds {token} {found} times, but {images} images were given")
        return text
    if text.lstrip().startswith("["):
        try:
            messages = json.loads(text)
        except json.JSONDecodeError:
            messages = None
        if isinstance(messages, list) and messages and all(isinstance(turn, dict) for turn in messages):
            return messages
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]
    if images and not token:
        raise UserError("the processor has neither a chat template nor an image token: it takes no images")
    return f"{token}\n" * images + text if images else text


def assemble(processor: Any, model: Any, prompt: str | Messages, photographs: list[Photograph]) -> Prompt:
    """Tokenise a prompt and find its image tokens.

    Raises
    ------
    UserError
        If the model has no image token id, or the processor and the model do not agree about it.
    """
    from csp_ext.integration.modality import modality_of_ids, placeholder_ids

    placeholders = placeholder_ids(model.config)
    if not placeholders:
        name = type(model).__name__
        raise UserError(f"{name} has no image_token_id in its config: its prompts hold no images")
    try:
        if not isinstance(prompt, str):
            prompt = str(processor.apply_chat_template(prompt, add_generation_prompt=True))
        images = [photograph.image for photograph in photographs] or None
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
    except Exception as error:  # templates and processors raise anything from TypeError to jinja's own
        raise UserError(f"the processor refuses this prompt: {first_line(error)}") from error
    modality = modality_of_ids(inputs["input_ids"][0], placeholders)
    if photographs and not bool((modality > 0).any()):
        ids = ", ".join(str(token) for token in placeholders)
        raise UserError(
            f"none of the prompt's {modality.numel()} tokens is the model's image token (id {ids}): "
            "the processor does not belong to this model"
        )
    return Prompt(inputs.to(model.device, model.dtype), modality.cpu(), photographs)


def why_no_patches(prompt: Prompt) -> str:
    """Return why image tokens are not patches of a picture; empty where each image is one square of them."""
    images = len(prompt.photographs)
    if images == 0:
        return "the prompt has no images"
    pixels = prompt.inputs.get("pixel_values")
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else ()
    # Several tiles per image, or patches in a row of their own, would be drawn in the wrong places.
    if len(shape) != 4 or shape[0] != images or shape[2] != shape[3]:
        return "this model does not see each image as one square"
    if patch_side(prompt) ** 2 * images != prompt.image_tokens:
        return f"{prompt.image_tokens} tokens for {images} images are not squares of patches"
    return ""


def patch_side(prompt: Prompt) -> int:
    """Return the side of the square of patches, in row-major order, that one image's tokens are."""
    return math.isqrt(prompt.image_tokens // len(prompt.photographs))


def seen_pixels(processor: Any, prompt: Prompt) -> list[np.ndarray]:
    """Return what the vision tower sees of each photograph, [side, side, 3] in [0, 1]: resized, cropped."""
    pixels = prompt.inputs["pixel_values"].float().cpu()
    images = processor.image_processor
    if getattr(images, "do_normalize", False):
        pixels = pixels * torch.tensor(images.image_std).view(-1, 1, 1)
        pixels = pixels + torch.tensor(images.image_mean).view(-1, 1, 1)
    return list(pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy())
