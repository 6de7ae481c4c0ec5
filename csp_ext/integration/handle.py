"""``apply`` puts CSP into a model, the :class:`Handle` it returns takes it out again."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StoppingCriteriaList

from csp_ext.config import CSPConfig
from csp_ext.integration import attention as attentions
from csp_ext.integration import flash
from csp_ext.integration.cache import PrunedLayer, adopt_cache, pruned_layers
from csp_ext.integration.generation import (
    KeepRoom,
    StaticCaches,
    check_turn,
    leave_whole,
    new_tokens,
    note_turn,
    refuse_old_mask,
)
from csp_ext.integration.growth import make_room
from csp_ext.integration.modality import modality_of_embeddings, modality_of_ids, real_tokens
from csp_ext.integration.prompt import ANNOUNCED, Plan, Prompt
from csp_ext.integration.static import CSPStaticCache
from csp_ext.integration.stats import PruneStats
from csp_ext.integration.support import check_model, decoder_key
from csp_ext.methods import CSP, Method, make_method


def apply(
    model: PreTrainedModel,
    config: CSPConfig | None = None,
    *,
    method: str | Method | None = None,
    attention: str | None = None,
    **fields: Any,
) -> Handle:
    """Prune the KV cache of every prompt this model sees, until :meth:`Handle.restore`.

    Parameters
    ----------
    model : PreTrainedModel
        A vision-language model of transformers (5.4 or newer) whose prompts hold placeholders for images.
    config : CSPConfig, optional
        Which CSP; default ``CSPConfig()``.
    method : str or Method, optional
        Another method instead: a name of ``csp_ext.methods.METHODS`` such as "snapkv", or an instance.
    attention : {"csp"}, optional
        How to attend to a pruned prompt: "csp" is the compiled ``decode``, for up to 8 new queries at a time
        (prompts go through sdpa); default: the model's own implementation. With flash_attention_2, which
        takes no mask, prompts go through flash-attn and all that follows as for "csp" in either case.
    **fields
        Any field of the config or the named method, e.g. ``budget=0.2``: a float in (0, 1] is a share of the
        batch's longest prompt, an int is a number of tokens.

    Returns
    -------
    Handle
        Also a context manager. Applying twice returns the same handle, with the new config.

    Raises
    ------
    TypeError
        If `model` is not a model of transformers, or a field has the wrong type.
    ValueError
        If this model cannot be pruned; the message says why, and the model is left as it was.

    Examples
    --------
    >>> handle = csp_ext.apply(model, budget=0.2)
    >>> model.generate(**inputs)
    >>> print(handle.stats)
    >>> handle.restore()
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"apply: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = _method(config, method, fields)
    shared = isinstance(chosen, CSP) and chosen.config.heads == "shared"
    if shared and (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            'apply: heads="shared" needs the scores of all heads, and tensor parallelism splits them'
        )
    if attention not in (None, attentions.OWN):
        raise ValueError(f"apply: attention must be {attentions.OWN!r} or None, got {attention!r}")
    handle = model.__dict__.get("_csp_handle")
    if handle is None:
        return Handle(model, chosen, attention)
    handle.method = chosen
    handle._attend(attention)
    return handle


def _method(config: CSPConfig | None, method: str | Method | None, fields: dict[str, Any]) -> Method:
    if config is not None and not isinstance(config, CSPConfig):
        raise TypeError(f"apply: config must be a CSPConfig, got {type(config).__name__}")
    if config is not None and method is not None:
        raise TypeError("apply: give a config or a method, not both")
    if isinstance(method, Method):
        return dataclasses.replace(cast(Any, method), **fields) if fields else method
    if config is not None:
        return CSP(dataclasses.replace(config, **fields))
    return make_method("csp" if method is None else method, **fields)


def _fresh(bound: dict[str, Any]) -> Any:
    """Return what a forward adds to its cache: ids [B, q] or embeddings [B, q, hidden]; None for neither."""
    ids = bound.get("input_ids")
    return bound.get("inputs_embeds") if ids is None else ids


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
        self._attend(attention)
        if self._text_config._attn_implementation == self._base:
            raise ValueError(f"apply: {type(model).__name__} does not use transformers' AttentionInterface")
        self._own_generate = model.__dict__.get("generate")
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        # Instance attributes, so that the class and every other model stay as they are.
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["_csp_handle"] = self

    def _attend(self, attention: str | None) -> None:
        """Attend to pruned prompts with csp_ext's own kernel, or as the model did before."""
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
        layers = pruned_layers(cache)
        for layer in layers:
            layer.attended, layer.plan, layer.buffer, layer.own = True, None, 0, self._own
        # A step of generate: its room was checked, and what it appends is text that all that follows sees.
        stepping = prompt.single and prompt.reached
        complete = bool(layers[0].slots or layers[0].settled)
        if not complete:
            self._prepare(layers, prompt, bound, self._method_of(cache))
        elif prompt.recording is not None:
            prompt.recording.keep(layers)
        if layers[0].plan is None and not stepping:
            self._turn(layers, prompt, bound)  # may prune a cache that was whole so far
            check_turn(layers, _fresh(bound), bound.get("attention_mask"))
        if complete:
            prompt.reached = prompt.reached or self._turn_ends(layers, prompt, bound)
        elif isinstance(cache, CSPStaticCache) and layers[0].plan is None and prompt.reached:
            leave_whole(layers, _fresh(bound), prompt.to_come)
        if not made:
            return None
        bound["past_key_values"] = cache
        return (), bound

    def _prepare(
        self, layers: list[PrunedLayer], prompt: Prompt, bound: dict[str, Any], method: Method
    ) -> None:
        """Give the layers of an unpruned cache a plan if this forward completes a prompt."""
        fresh = _fresh(bound)
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
        modality = self._modality(prompt, bound, seen, length)
        if modality is None:
            self._warn(
                "which of its positions are images cannot be seen (embeddings, or an earlier turn); "
                "pass them in `with handle.prompt(modality=...)`"
            )
            return
        real = real_tokens(bound.get("attention_mask"), length)
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
    def _turn_ends(layers: list[PrunedLayer], prompt: Prompt, bound: dict[str, Any]) -> bool:
        """Say whether a forward brings the last tokens of a later turn, which may come in chunks."""
        fresh = _fresh(bound)
        if prompt.length is None or fresh is None:
            return True
        return int(layers[0].get_seq_length()) + fresh.shape[1] >= prompt.length - prompt.delay

    def _turn(self, layers: list[PrunedLayer], prompt: Prompt, bound: dict[str, Any]) -> None:
        """Prepare layers that are pruned again for tokens that no step of ``generate`` brings."""
        fresh = _fresh(bound)
        if layers[0].growth is None or fresh is None:
            return
        # Where generate begins, it was done before the masks were made.
        if not prompt.single and make_room(layers, fresh.shape[1]):
            self._renewed()
            refuse_old_mask(layers[0], bound.get("attention_mask"))
        ids, known, seen = bound.get("input_ids"), prompt.modality, int(layers[0].get_seq_length())
        if known is not None and known.shape[1] == seen + fresh.shape[1]:
            kinds = known[:, seen:].to(torch.int8).repeat_interleave(len(fresh) // len(known), dim=0)
        elif ids is not None:
            kinds = modality_of_ids(ids, self._placeholders)
        else:
            text = torch.zeros(fresh.shape[:2], dtype=torch.int8, device=fresh.device)
            shown = self._embedded(bound)
            kinds = text if shown is None else shown
        note_turn(layers, kinds, bound.get("attention_mask"), seen)

    def _modality(self, prompt: Prompt, bound: dict[str, Any], seen: int, length: int) -> Tensor | None:
        """Return the modality [B, length] of a prompt that is complete now, None where it cannot be seen."""
        ids: Any = bound.get("input_ids")
        fresh = _fresh(bound)
        modality = prompt.modality_for(fresh.shape[0], self._placeholders, fresh.device)
        if modality is None and ids is not None and seen == 0:
            modality = modality_of_ids(ids[:, :length], self._placeholders)
        if modality is None and bound.get("mm_token_type_ids") is not None:
            types = bound["mm_token_type_ids"]
            modality = types[:, :length].to(torch.int8) if types.shape[1] >= length else None
        if modality is None and ids is None and seen == 0:
            modality = self._embedded(bound)
            modality = None if modality is None else modality[:, :length]
        return modality

    def _embedded(self, bound: dict[str, Any]) -> Tensor | None:
        """Return the modality of `inputs_embeds` that come with images, None where none come."""
        if bound.get("pixel_values") is None and not bound.get("mm_encoder_outputs"):
            return None
        table = self.model.get_input_embeddings()
        return modality_of_embeddings(bound["inputs_embeds"], table, self._placeholders)
