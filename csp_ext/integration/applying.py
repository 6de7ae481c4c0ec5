"""``apply`` puts CSP, or another method, into a model."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from transformers import PreTrainedModel

from csp_ext.config import CSPConfig
from csp_ext.integration.attention import OWN
from csp_ext.integration.handle import Handle
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
    if attention not in (None, OWN):
        raise ValueError(f"apply: attention must be {OWN!r} or None, got {attention!r}")
    handle = model.__dict__.get("_csp_handle")
    if handle is None:
        return Handle(model, chosen, attention)
    handle.method = chosen
    handle.attend(attention)
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
