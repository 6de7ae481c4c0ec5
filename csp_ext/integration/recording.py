"""A prompt run once over the full cache, to be pruned by any number of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from csp_ext.integration.cache import PrunedLayer, pruned_layers
from csp_ext.integration.handle import Handle
from csp_ext.integration.prompt import ANNOUNCED, Plan, Prompt
from csp_ext.integration.stats import PruneStats
from csp_ext.methods.base import Method


class Recording:
    """The full cache of a batch of prompts, and the queries that methods look at.

    Pruning it gives the cache that the same prompts leave with the method applied: the attention inside the
    prompt is never pruned, so all methods share one prefill.

    Attributes
    ----------
    inputs : dict
        As given to :meth:`of`.
    modality : Tensor
        [B, L] int8, -1 padding; grows with :meth:`extend`.
    logits : Tensor
        [B, vocabulary], of the token after the last.
    """

    inputs: dict[str, Any]
    modality: Tensor
    logits: Tensor

    def __init__(self, handle: Handle, observes: int | None) -> None:
        self._handle = handle
        self._observes = observes
        self._real: Tensor | None = None
        self.cache: Any = None

    @classmethod
    @torch.no_grad()
    def of(cls, handle: Handle, inputs: Mapping[str, Any], observes: int | None = None) -> Recording:
        """Run the prompts.

        Parameters
        ----------
        handle : Handle
            Of the model; its method is not used.
        inputs : mapping
            Of the processor: `input_ids`, `attention_mask`, `pixel_values`, ...
        observes : int, optional
            How many of the last queries to keep; default all.
        """
        recording = cls(handle, observes)
        recording.inputs = dict(inputs)
        recording._forward(dict(inputs) | recording._positions(inputs.get("attention_mask")))
        return recording

    def begin(self, layers: list[PrunedLayer], modality: Tensor, real: Tensor | None) -> None:
        """Note what the prompt consists of, and have its layers keep their queries."""
        self.modality = modality if real is None else modality.masked_fill(~real, -1)
        self._real = real
        self.keep(layers)

    def keep(self, layers: list[PrunedLayer]) -> None:
        """Have the layers keep their queries of this forward, too."""
        for layer in layers:
            layer.buffer = self.modality.shape[1] if self._observes is None else self._observes

    def _forward(self, inputs: dict[str, Any]) -> None:
        token = ANNOUNCED.set(Prompt(self._handle, None, recording=self))
        try:
            output = self._handle.model(
                **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        finally:
            ANNOUNCED.reset(token)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> None:
        """Run text tokens, int64 [B, m], over the full cache, after the prompt."""
        added = self.modality.new_zeros(tokens.shape)
        self.modality = torch.cat([self.modality, added], dim=1)
        self._real = self.modality >= 0
        for layer in pruned_layers(self.cache):
            layer.settled = True
        mask = self._real.to(torch.int64)
        positions = self._positions(mask, tokens.shape[1])
        self._forward({"input_ids": tokens, "attention_mask": mask, **positions})

    def _positions(self, mask: Tensor | None, last: int = 0) -> dict[str, Tensor]:
        """Return the positions of the `last` tokens (0: of all), counted as ``generate`` counts padded rows.

        Empty without padding, and where the model has positions of several kinds, which only it can count.
        """
        rope = getattr(self._handle.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        if mask is None or "mrope_section" in rope or bool(mask.all()):
            return {}
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return {"position_ids": positions[:, -last:]}

    @torch.no_grad()
    def pruned(self, method: Method, length: int | None = None) -> tuple[DynamicCache, PruneStats]:
        """Return the cache as `method` leaves it.

        Parameters
        ----------
        method : Method
            Sees all recorded queries.
        length : int, optional
            Prune the first so many tokens and drop what follows them; default all.
        """
        length = self.modality.shape[1] if length is None else length
        real = None if self._real is None else self._real[:, :length]
        layers = [self._copy(layer, length) for layer in self.cache.layers]
        prunable = [layer for layer in layers if isinstance(layer, PrunedLayer)]
        plan = Plan.make(self.modality[:, :length], real, method, len(prunable))
        for index, layer in enumerate(prunable):
            source = pruned_layers(self.cache)[index]
            assert source.queries is not None
            plan.carry_out(index, layer, source.queries, source.scale, source.causal)
            layer.settled = True
        cache = DynamicCache()
        cache.layers = layers
        cache.layer_class_to_replicate = None
        return cache, plan.stats

    @staticmethod
    def _copy(layer: Any, length: int) -> Any:
        if not isinstance(layer, PrunedLayer):
            raise ValueError(f"a cache with a {type(layer).__name__} cannot be recorded")
        copy = PrunedLayer.adopt(layer)
        copy.keys, copy.values, copy.seen = layer.keys[:, :, :length], layer.values[:, :, :length], length
        return copy
