"""LLaVA-1.5 in the sizes of its releases and scaled down, with random weights that are never copied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of one LLaVA.

    Attributes
    ----------
    hidden, intermediate, layers, heads, vocabulary : int
        Of the decoder; every head has keys and values of its own.
    image_token : int
        The id that stands for a patch.
    vision : tuple of int
        Of the CLIP tower: hidden size, intermediate size, layers, heads.
    image, patch : int
        Pixels of a side; an image becomes ``(image // patch) ** 2`` tokens.
    positions : int
        Most tokens that the decoder is made for.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    image_token: int
    vision: tuple[int, int, int, int]
    image: int = 336
    patch: int = 14
    positions: int = 4096

    def config(self) -> Any:
        """Return the LlavaConfig."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        width, inner, layers, heads = self.vision
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=self.image,
            patch_size=self.patch,
        )
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.positions,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.image_token,
            image_seq_length=(self.image // self.patch) ** 2,
        )


_CLIP_LARGE = (1024, 4096, 24, 16)
SHAPES = {
    "llava-7b": Shape(4096, 11008, 32, 32, 32064, 32000, _CLIP_LARGE),
    "llava-13b": Shape(5120, 13824, 40, 40, 32064, 32000, _CLIP_LARGE),
    # A prompt of 3100 tokens takes half a second on two cores, so all batches, budgets and rivals fit into a
    # quarter of an hour; one layer of twelve still shows beside a cache of 10 %, and batch 8 fills 300 MB.
    "scaled": Shape(128, 352, 12, 2, 4096, 4095, (64, 128, 3, 2)),
}
# Enough to see that the command works.
QUICK = Shape(64, 160, 3, 2, 512, 511, (32, 64, 2, 2), image=84)


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Return the model without memory behind its parameters, for counting and for :func:`fill`."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def fill(model: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Give a skeleton random weights, parameter by parameter, in their own type and on their device.

    Matrices are drawn for outputs of unit variance, vectors are ones (scales) or zeros (shifts).
    """
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in made:
                made[id(empty)] = nn.Parameter(_drawn(name, empty, device, generator), requires_grad=False)
            setattr(module, name, made[id(empty)])
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Buffers such as rotary frequencies are computed: a second module of the kind knows how.
            twin = type(module)(module.config)
            for name, buffer in twin.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _drawn(name: str, like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim < 2:
        return tensor.fill_(1.0 if name == "weight" else 0.0)
    return tensor.normal_(std=1 / math.sqrt(like[0].numel()), generator=generator)


def parameter_bytes(model: nn.Module) -> int:
    """Return the size of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def step_weight_bytes(model: Any) -> int:
    """Return how many bytes of weights a decode step reads: the decoder and the output layer.

    Of the embedding it reads a row per token, of the vision tower nothing.
    """
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    decoder = sum(parameter.nbytes for parameter in model.get_decoder().parameters())
    return decoder - table.nbytes + head.nbytes
