"""A cache of fixed capacity: the pruned prompt and room for new tokens, allocated once, never moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer

from csp_ext.config import CSPConfig
from csp_ext.dispatch import implementation_for
from csp_ext.integration.cache import PrunedLayer
from csp_ext.integration.front import Front
from csp_ext.integration.growth import make_room
from csp_ext.methods import CSP, Method, make_method
from csp_ext.methods.base import Renewal

_ANY_LENGTH = 2**31  # sliding layers of the model are bounded by their window


class StaticPrunedLayer(PrunedLayer):
    """A layer that grows while its prompt comes in, and is a buffer of fixed capacity from then on.

    The prompt attends to its whole keys and values, which never enter the buffer. When it is complete, what
    is kept of it is written to the first slots of the buffer [B, Hkv, slots + room, D]; new tokens follow in
    place.

    Parameters
    ----------
    room : int
        Slots for the tokens after the prompt. Where the method prunes again, after at most so many, the
        buffer holds T + m of them instead.
    """

    is_compileable = True
    buffered = True

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.static = False  # the prompt is complete, `keys` and `values` are the buffers
        self.end: Any = None  # 0-dim int32, one past the last written slot
        self.offset: Any = None  # 0-dim int64, tokens seen less slots written
        self._length = 0  # of the prompt
        self._buffers: tuple[Tensor, Tensor, Front] | None = None  # to be used again after a reset

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        compiling = torch.compiler.is_compiling()
        if not self.static:
            if compiling or not self.attended:
                raise RuntimeError(
                    "a CSPStaticCache takes its prompt in an uncompiled forward of a model to which "
                    "csp_ext.apply(model) is applied"
                )
            return super().update(key_states, value_states, *args, **kwargs)
        if not compiling:
            self._check_attended()
        new = key_states.shape[-2]
        slots = torch.arange(new, device=self.keys.device) + self.end
        # Under autocast the keys come in float32 and the values in the lower type; the buffers have one type.
        self.keys.index_copy_(2, slots, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, slots, value_states.to(self.values.dtype))
        self.end.add_(new)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return the number of tokens seen: an int before the prompt is complete, then a 0-dim tensor."""
        return self.end + self.offset if self.static else self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.static:
            return super().get_mask_sizes(query_length)
        return self.keys.shape[-2], self._length - self.slots

    def get_max_length(self) -> int:
        """Return how many tokens the layer can see, -1 where that is not known or not bounded."""
        return self._length + self.columns if self.static and self.growth is None else -1

    @property
    def columns(self) -> int:
        """Slots after the prompt."""
        return self.keys.shape[-2] - self.slots if self.static else self.room

    def written(self) -> int:
        """Return how many physical slots are in use; reads the device."""
        return int(self.end) if self.static else super().written()

    def free(self) -> int:
        """Return how many more tokens after the prompt there is room for; reads the device."""
        return self.columns - self.after() if self.static else self.room

    def grows(self, renewal: Renewal) -> bool:
        return renewal.interval <= self.room

    def replace_prompt(self, key: Tensor, value: Tensor, length: int, front: Front) -> None:
        tail = self.keys[:, :, length:], self.values[:, :, length:]
        written = key.shape[-2] + tail[0].shape[-2]
        capacity = key.shape[-2] + self.room if self.growth is None else self.growth.limit
        if written > capacity:
            raise ValueError(
                f"the cache has room for {capacity - key.shape[-2]} new tokens, got {tail[0].shape[-2]}; "
                "make it with a larger max_new_tokens"
            )
        keys, values, kept = self._allocate(key, value, front, capacity)
        with torch.no_grad():
            for buffer, prompt, drafts in ((keys, key, tail[0]), (values, value, tail[1])):
                buffer[:, :, : key.shape[-2]] = prompt
                buffer[:, :, key.shape[-2] : written] = drafts
                # What a free slot holds is multiplied by zero, so it must be a number.
                buffer[:, :, written:] = 0
        if self.end is None or not _usable(self.end, key.device):
            self.end = _static(torch.zeros((), dtype=torch.int32, device=key.device))
            self.offset = _static(torch.zeros((), dtype=torch.int64, device=key.device))
        self.end.fill_(written)
        self.offset.fill_(length - key.shape[-2])
        kept.end = self.end
        self._hold(keys, values, kept)
        self._length, self.static, self.settled = length, True, True

    def keep_prompt(self, length: int, front: Front) -> None:
        self.replace_prompt(self.keys[:, :, :length], self.values[:, :, :length], length, front)

    def _allocate(
        self, key: Tensor, value: Tensor, front: Front, capacity: int
    ) -> tuple[Tensor, Tensor, Front]:
        """Return buffers of `capacity` slots, and `front`: the ones of the last prompt where they fit."""
        shape = (*key.shape[:2], capacity)
        old, self._buffers = self._buffers, None
        if (
            old is None
            or not _fits(old[0], key, (*shape, key.shape[-1]))
            or not _fits(old[1], value, (*shape, value.shape[-1]))
        ):
            old = None  # free it first
            keys, values = (
                _static(torch.zeros((*shape, tensor.shape[-1]), dtype=tensor.dtype, device=tensor.device))
                for tensor in (key, value)
            )
            front.each(_static)
            if front.ring is not None:
                _static(front.ring.count)
            return keys, values, front
        keys, values, last = old
        _keep_places(front, last)
        return keys, values, front

    def renew(self, places: Tensor, front: Front, written: int) -> None:
        assert self.front is not None
        key, value = self.keys[:, :, :written], self.values[:, :, :written]
        implementation_for(key).compact_(key, value, places.contiguous())
        self.end.fill_(places.shape[-1])
        self.offset.add_(written - places.shape[-1])
        self._length += written - self.slots
        _keep_places(front, self.front)
        front.end = self.end
        self._hold(self.keys, self.values, front)

    def _hold(self, keys: Tensor, values: Tensor, front: Front) -> None:
        self.keys, self.values, self.front = keys, values, front
        # A compiled attention function sees this tensor and nothing else of the cache.
        self.keys.csp_front = front

    def crop(self, tokens_to_remove: int) -> None:
        if not self.static:
            super().crop(tokens_to_remove)
            return
        seen = int(self.get_seq_length())
        # Before transformers 5.14 a positive argument is the length to crop to.
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        after = seen - self._length
        if remove > after:
            raise ValueError(
                f"crop would remove {remove} tokens, only the {after} after the pruned prompt can go"
            )
        self._forget(remove)
        self.end.sub_(remove)

    def reset(self) -> None:
        """Forget the prompt; the buffers are used again where the next one fits them."""
        if self.static:
            assert self.front is not None
            self._buffers = self.keys, self.values, self.front
        self.static = False
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.static:
            super().reorder_cache(beam_idx)
            return
        assert self.front is not None
        for tensor in (self.keys, self.values):
            tensor.copy_(_rows(tensor, beam_idx))
        self.front.each(lambda tensor: tensor.copy_(_rows(tensor, beam_idx)))
        if self.growth is not None:
            self.growth.each(lambda tensor: _rows(tensor, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._held_again()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._held_again()

    def _held_again(self) -> None:
        """Attach what attention must know to the buffers of another batch size."""
        if self.static and self.front is not None:
            self._hold(_static(self.keys), _static(self.values), self.front)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.index_select(0, index.to(tensor.device))


def _keep_places(front: Front, last: Front) -> None:
    """Have the tensors of `front` stand where those of another one stood, as far as they fit."""
    for name in ("bias", "start", "log_n"):
        new, kept = getattr(front, name), getattr(last, name)
        if new is not None and new is not kept:
            same = kept is not None and _fits(kept, new, new.shape)
            setattr(front, name, kept.copy_(new) if same else _static(new))
    if front.ring is None or front.ring is last.ring:
        return
    if last.ring is not None and _fits(last.ring.queries, front.ring.queries, front.ring.queries.shape):
        last.ring.become(front.ring)
        front.ring = last.ring
    else:
        front.ring.each(_static)
        _static(front.ring.count)


def _static(tensor: Tensor) -> Tensor:
    """Tell CUDA graphs that a tensor stays where it is, without a guard that recompiles for another one."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def _fits(buffer: Tensor, like: Tensor, shape: Any) -> bool:
    return tuple(buffer.shape) == tuple(shape) and buffer.dtype == like.dtype and _usable(buffer, like.device)


def _usable(buffer: Tensor, device: torch.device) -> bool:
    """Say whether a buffer is on this device and may be written to now."""
    return buffer.device == device and (torch.is_inference_mode_enabled() or not buffer.is_inference())


class CSPStaticCache(Cache):
    """A pruned cache of fixed capacity, for compiled decoding.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    method : str or Method or CSPConfig, optional
        What prunes the prompt; default: what is applied to the model. The model must have
        :func:`csp_ext.apply` applied in either case.
    max_new_tokens : int
        Room for the tokens after the first prompt, at least 1.

    Notes
    -----
    After :meth:`reset` the next prompt uses the same buffers where its batch size and slots fit. The first
    prompt decides: what it leaves in the cache is not pruned later.

    Examples
    --------
    >>> csp_ext.apply(model, budget=512)
    >>> cache = csp_ext.CSPStaticCache(model.config, max_new_tokens=128)
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=128)
    """

    def __init__(
        self, config: Any, method: str | Method | CSPConfig | None = None, *, max_new_tokens: int
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens must be an int, got {type(max_new_tokens).__name__}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if isinstance(method, str):
            method = make_method(method)
        elif isinstance(method, CSPConfig):
            method = CSP(method)
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"method must be a name, a Method or a CSPConfig, got {type(method).__name__}")
        stock = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=_ANY_LENGTH)
        super().__init__(
            layers=[
                StaticPrunedLayer(max_new_tokens) if type(layer) is StaticLayer else layer
                for layer in stock.layers
            ]
        )
        self.method = method
        self.max_new_tokens = max_new_tokens

    @property
    def _first(self) -> StaticPrunedLayer:
        return next(layer for layer in self.layers if isinstance(layer, StaticPrunedLayer))

    @property
    def static(self) -> bool:
        """Whether the prompt is complete and the buffers are filled."""
        return self._first.static

    def free(self) -> int:
        """Return how many more tokens after the prompt there is room for; reads the device."""
        return self._first.free()

    @property
    def grows(self) -> bool:
        """Whether the cache is pruned again whenever it is full (``CSPConfig.decode_interval``)."""
        return self._first.growth is not None

    def make_room(self, tokens: int = 1) -> bool:
        """Prune again if `tokens` more would not fit, as ``generate`` and uncompiled forwards do themselves.

        For a decode loop of your own whose step is compiled: call it before every step, or at least before
        :meth:`free` tokens have been added. Reads the device.

        Returns
        -------
        bool
            Whether the cache was pruned. False, too, where it is full and does not grow.
        """
        return make_room([layer for layer in self.layers if isinstance(layer, StaticPrunedLayer)], tokens)
