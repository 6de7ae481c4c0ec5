"""The :class:`Handle` that ``apply`` returns: what runs around a model's forwards, and its way out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StoppingCriteriaList

from csp_ext.config import CSPConfig
from csp_ext.integration import attention as attentions
from csp_ext.integration import flash
from csp_ext.integration.cache import PrunedLayer, adopt_cache, pruned_layers
from csp_ext.integration.generation import KeepRoom, StaticCaches, leave_whole, new_tokens
from csp_ext.integration.growth import make_room
from csp_ext.integration.incoming import Incoming
from csp_ext.integration.modality import real_tokens
from csp_ext.integration.prompt import ANNOUNCED, Plan, Prompt
from csp_ext.integration.static import CSPStaticCache
from csp_ext.integration.stats import PruneStats
from csp_ext.integration.support import check_model, decoder_key
from csp_ext.integration.turn import check_turn, note_turn, refuse_old_mask
from csp_ext.methods import CSP, Method


def _grows(cache: Any) -> bool:
    """Say whether what a cache holds is pruned again, whatever is applied now."""
    layers = pruned_layers(cache) if isinstance(cache, Cache) else []
    return bool(layers) and layers[0].growth is not None


class Handle:
    """CSP inside one model. Made by :func:`apply`.

    Attributes
    ----------
    model : PreTrainedModel
        The model.
    method : Method
        What is applied; replacing it takes effect from the next prompt on.
    """

    def __init__(self, model: PreTrainedModel, method: Method, attention: str | None = None) -> None:
        self._placeholders = check_model(model)
        self._decoder_key = decoder_key(model)
        self.model = model
        self.method = method
        self._stats = PruneStats()
        self._warned: set[str] = set()
        self._arguments = tuple(inspect.signature(model.forward).parameters)
        self._text_config = model.config.get_text_config(decoder=True)
        self._base = self._text_config._attn_implementation
        self._static = StaticCaches(model)
        attentions.register()
        self.attend(attention)
        if self._text_config._attn_implementation == self._base:
            raise ValueError(f"apply: {type(model).__name__} does not use transformers' AttentionInterface")
        self._own_generate = model.__dict__.get("generate")
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        # Instance attributes, so that the class and every other model stay as they are.
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["_csp_handle"] = self

    def attend(self, attention: str | None) -> None:
        """Attend to pruned prompts with csp_ext's own kernel ("csp"), or as the model did before (None)."""
        on_flash = self._base == flash.BASE  # which takes no mask that would hide slots
        self._own = on_flash or attention == attentions.OWN
        self._set_attention((None if on_flash else attention) or attentions.IMPLEMENTATIONS[self._base])

    def _set_attention(self, name: str) -> None:
        self.model.set_attn_implementation({self._decoder_key: name} if self._decoder_key else name)

    def restore(self) -> None:
        """Leave the model exactly as it was before :func:`apply`. Safe to call twice."""
        if self.model.__dict__.get("_csp_handle") is not self:
            return
        self._hook.remove()
        attributes = self.model.__dict__
        del attributes["_csp_handle"]
        attributes.pop("generate", None)
        if self._own_generate is not None:
            attributes["generate"] = self._own_generate
        self._set_attention(self._base)
        self._static.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    @property
    def config(self) -> CSPConfig:
        """The CSPConfig of a CSP method; replacing it takes effect from the next prompt on."""
        if not isinstance(self.method, CSP):
            raise AttributeError(f"the applied method is {self.method!r}, which has no CSPConfig")
        return self.method.config

    @config.setter
    def config(self, config: CSPConfig) -> None:
        self.method = CSP(config)

    @property
    def stats(self) -> PruneStats:
        """What was kept of the last prompt; empty before the first one."""
        return self._stats

    @contextmanager
    def prompt(self, *, modality: Tensor | None = None, length: int | None = None) -> Iterator[None]:
        """Say about the prompts in this block what the model's arguments do not show.

        Parameters
        ----------
        modality : Tensor, optional
            Integers [B, L]: 0 text, 1 image, further ids for other modalities, -1 padding. Needed for prompts
            given as `inputs_embeds`, where no placeholder ids can be seen.
        length : int, optional
            Tokens of the whole prompt, earlier turns included, where it comes in several forward calls;
            ``generate`` knows its own.
        """
        if modality is not None:
            if modality.ndim != 2 or modality.is_floating_point():
                raise ValueError(
                    f"prompt: modality must be integers [B, L], got {modality.dtype} {tuple(modality.shape)}"
                )
            length = modality.shape[1] if length is None else length
            if modality.shape[1] != length:
                raise ValueError(f"prompt: modality has {modality.shape[1]} positions, length is {length}")
        token = ANNOUNCED.set(Prompt(self, length, modality=modality))
        try:
            yield
        finally:
            ANNOUNCED.reset(token)

    def _announced(self) -> Prompt | None:
        prompt = ANNOUNCED.get()
        return prompt if prompt is not None and prompt.owner is self else None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own ``generate``, noting where the prompt ends: chunks and drafts hide it."""
        model: Any = self.model
        own = self._own_generate or type(model).generate.__get__(model)
        kwargs |= dict(zip(list(inspect.signature(own).parameters)[1:], args[1:], strict=False))
        args = args[:1]
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        sources = (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), ids)
        lengths = [
            source.shape[1] for source in sources if isinstance(source, Tensor) and source.ndim in (2, 3)
        ]
        if not lengths:
            return own(*args, **kwargs)
        given = kwargs.get("past_key_values")
        method = self._method_of(given)
        count = new_tokens(model, kwargs, ids.shape[1] if isinstance(ids, Tensor) else lengths[0])
        cache = self._static.prepare(kwargs, count, lengths[0], method.decode_interval)
        if cache is not None and method.delay:
            raise ValueError("generate: a static cache is pruned right after the prompt; set delay=0")
        outer = self._announced()
        whole = isinstance(ids, Tensor) and ids.ndim == 2 and kwargs.get("inputs_embeds") is None
        known = outer.modality if outer else None
        prompt = Prompt(self, lengths[0], 0, ids if whole else None, known, single=True, to_come=count - 1)
        if getattr(kwargs.get("generation_config"), "is_assistant", False):
            self._warn("this model drafts for another, which takes tokens of the prompt back", stacklevel=3)
            prompt.length = 0
        else:
            prompt.put_off(method.delay)
        if given is not None and prompt.length:
            self._room_for_turn(given, lengths[0])
        if method.decode_interval is not None or _grows(given):
            asked = kwargs.get("stopping_criteria") or []
            kwargs["stopping_criteria"] = StoppingCriteriaList([*asked, KeepRoom(prompt, self._renewed)])
        token = ANNOUNCED.set(prompt)
        try:
            result = own(*args, **kwargs)
        finally:
            ANNOUNCED.reset(token)
        if not prompt.reached:
            self._warn("no forward of the whole model completed the prompt", stacklevel=3)
        if cache is not None and given is None and getattr(result, "past_key_values", None) is not cache:
            self._static.keep(cache)
        return result

    def _room_for_turn(self, cache: Any, length: int) -> None:
        """Prune a cache again that a new turn would overfill; its masks are made before the forward."""
        if not _grows(cache):
            return
        layers = pruned_layers(cache)
        if layers[0].slots and make_room(layers, length - int(layers[0].get_seq_length())):
            self._renewed()

    def _renewed(self) -> None:
        self._stats.renewals += 1

    def _method_of(self, cache: Any) -> Method:
        """Return what prunes this cache: a static one may bring its own method."""
        return getattr(cache, "method", None) or self.method

    def _warn(self, reason: str, stacklevel: int = 4) -> None:
        """Say once per reason that a prompt is generated from correctly, but not pruned."""
        self._stats = PruneStats()
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"csp_ext: this prompt is left unpruned: {reason}", UserWarning, stacklevel=stacklevel
            )

    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Swap the cache's layers, and decide on the prompt in the forward that completes it."""
        if torch.compiler.is_compiling():
            return None
        bound = dict(zip(self._arguments, args, strict=False)) | kwargs
        incoming = Incoming(bound, self.model, self._placeholders)
        cache: Any = bound.get("past_key_values")
        prompt = self._announced()
        made = cache is None
        if made:
            use_cache = bound.get("use_cache")
            wanted = getattr(self._text_config, "use_cache", True) if use_cache is None else use_cache
            # Training keeps the graph of the whole prompt anyway.
            if not wanted or (module.training and torch.is_grad_enabled()):
                if prompt is not None:
                    prompt.reached = True
                return None
            cache = DynamicCache(config=self._text_config)
        if prompt is None or not prompt.is_of(cache):
            prompt = Prompt(self, None)
        refused = adopt_cache(cache, self._text_config)
        if refused:
            prompt.reached = True
            self._warn(refused)
            return None
        layers, forward = pruned_layers(cache), object()
        for layer in layers:
            layer.attended, layer.plan, layer.buffer, layer.own = True, None, 0, self._own
            if layer.front is not None:
                layer.front.forward = forward
        # A step of generate: its room was checked, and what it appends is text that all that follows sees.
        stepping = prompt.single and prompt.reached
        complete = bool(layers[0].slots or layers[0].settled)
        if not complete:
            self._prepare(layers, prompt, incoming, self._method_of(cache))
        elif prompt.recording is not None:
            prompt.recording.keep(layers)
        if layers[0].plan is None and not stepping:
            self._turn(layers, prompt, incoming)  # may prune a cache that was whole so far
            check_turn(layers, incoming.fresh, incoming.mask)
        if complete:
            prompt.reached = prompt.reached or self._turn_ends(layers, prompt, incoming.fresh)
        elif isinstance(cache, CSPStaticCache) and layers[0].plan is None and prompt.reached:
            leave_whole(layers, incoming.fresh, prompt.to_come)
        if not made:
            return None
        bound["past_key_values"] = cache
        return (), bound

    def _prepare(self, layers: list[PrunedLayer], prompt: Prompt, incoming: Incoming, method: Method) -> None:
        """Give the layers of an unpruned cache a plan if this forward completes a prompt."""
        fresh = incoming.fresh
        if fresh is None:
            return
        seen = layers[0].seen
        end = seen + fresh.shape[1]
        # A forward of its own: its prompt is what it puts into an empty cache.
        length = prompt.length if prompt.length is not None else (end if seen == 0 else seen)
        if seen >= length:
            prompt.reached = True
            return
        if end < length:
            prompt.reached |= end >= length - prompt.delay
            for layer in layers:
                layer.buffer = method.observes(length)
            return
        prompt.reached = True
        modality = incoming.modality(prompt, seen, length)
        if modality is None:
            self._warn(
                "which of its positions are images cannot be seen (embeddings, or an earlier turn); "
                "pass them in `with handle.prompt(modality=...)`"
            )
            return
        real = real_tokens(incoming.mask, length)
        masked = True
        if prompt.modality is not None:
            known = modality >= 0
            masked = bool((known if real is None else known | ~real).all())
            real = known if real is None else real & known
        if prompt.recording is not None:
            prompt.recording.begin(layers, modality, real)
            return
        plan = Plan.make(modality, real, method, len(layers))
        plan.masked = masked
        for layer in layers:
            layer.plan, layer.buffer = plan, plan.selection.observes if layer.queries is not None else 0
        self._stats = plan.stats

    @staticmethod
    def _turn_ends(layers: list[PrunedLayer], prompt: Prompt, fresh: Any) -> bool:
        """Say whether a forward brings the last tokens of a later turn, which may come in chunks."""
        if prompt.length is None or fresh is None:
            return True
        return int(layers[0].get_seq_length()) + fresh.shape[1] >= prompt.length - prompt.delay

    def _turn(self, layers: list[PrunedLayer], prompt: Prompt, incoming: Incoming) -> None:
        """Prepare layers that are pruned again for tokens that no step of ``generate`` brings."""
        fresh = incoming.fresh
        if layers[0].growth is None or fresh is None:
            return
        # Where generate begins, it was done before the masks were made.
        if not prompt.single and make_room(layers, fresh.shape[1]):
            self._renewed()
            refuse_old_mask(layers[0], incoming.mask)
        seen = int(layers[0].get_seq_length())
        note_turn(layers, incoming.kinds(prompt, seen), incoming.mask, seen)
