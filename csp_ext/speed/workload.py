"""The static prompts of a measurement, and the memory that they will need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csp_ext.demo.console import UserError

IMAGES = 5
# Text behind the last image: more than csp_ext's window, which so holds words only.
QUESTION = 32


@dataclass(frozen=True)
class Workload:
    """A prompt of fixed length: images with text before each, and a question at the end.

    Attributes
    ----------
    tokens : int
        Of the prompt.
    images : int
        How many stand in it.
    per_image : int
        Tokens of each.
    """

    tokens: int
    images: int
    per_image: int

    @classmethod
    def of(cls, config: Any, tokens: int) -> Workload:
        """Return the prompt of so many tokens for this LlavaConfig, with five images where they fit."""
        per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        images = min(IMAGES, (tokens - QUESTION) // (per_image + 1))
        if images < 1:
            raise UserError(
                f"prompt-tokens must be at least {per_image + 1 + QUESTION} for an image of {per_image} "
                f"tokens and a question, got {tokens}"
            )
        return cls(tokens, images, per_image)

    def inputs(self, model: Any, rows: int) -> dict[str, Tensor]:
        """Return random ids and pixels of so many rows without padding, on the model's device."""
        config, device = model.config, model.device
        generator = torch.Generator().manual_seed(rows)
        image_token = config.image_token_id
        words = config.get_text_config(decoder=True).vocab_size - 1
        ids = torch.randint(0, words, (rows, self.tokens), generator=generator)
        ids += ids >= image_token  # any token but an image's
        text = self.tokens - self.images * self.per_image - QUESTION
        for image in range(self.images):
            begin = text * (image + 1) // self.images + image * self.per_image
            ids[:, begin : begin + self.per_image] = image_token
        side = config.vision_config.image_size
        pixels = torch.randn(rows * self.images, 3, side, side, generator=generator)
        return {
            "input_ids": ids.to(device),
            "pixel_values": pixels.to(device, model.dtype),
            "position_ids": torch.arange(self.tokens, device=device).expand(rows, -1),
        }


def slot_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * dtype.itemsize


def check_room(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    weights: int,
    tokens: int,
    batches: tuple[int, ...],
) -> None:
    """Check beforehand that the measurement fits into memory.

    On a GPU the smallest batch must fit: what does not is a row that says so. On a CPU all of them must,
    because the system would end the process.

    Parameters
    ----------
    config, dtype, device
        Of the model.
    weights : int
        Bytes of the parameters still to be allocated.
    tokens : int
        Of a row, the new ones included.
    batches : tuple of int
        Rows.

    Raises
    ------
    UserError
        Saying how much it would need.
    """
    rows = min(batches) if device.type == "cuda" else max(batches)
    text = config.get_text_config(decoder=True)
    cache = rows * tokens * slot_bytes(config, dtype)
    # A growing cache copies a layer's keys or values; the widest point of a prefill is inside the MLP.
    copies = cache // text.num_hidden_layers
    prefill = rows * tokens * (3 * text.intermediate_size + 4 * text.hidden_size) * dtype.itemsize
    needed, free = weights + cache + copies + prefill, free_bytes(device)
    if free is not None and needed > free:
        parts = f"model {_gib(weights)}, full cache {_gib(cache)}, prefill {_gib(copies + prefill)}"
        raise UserError(
            f"batch {rows} needs about {_gib(needed)} GiB ({parts}), {device} has {_gib(free)} GiB free; "
            "take a smaller --batch, --prompt-tokens or --model"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory can be allocated, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":") for line in file)
    except OSError:
        return None
    return int(facts["MemAvailable"].split()[0]) * 1024


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
