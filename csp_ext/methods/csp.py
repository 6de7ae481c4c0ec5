"""Cross-Self Pruning, this project's method, as a :class:`CSPConfig` describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from csp_ext.config import CSPConfig, ResolvedConfig
from csp_ext.methods.base import Layer, Method, Renewal, Selection
from csp_ext.selection import QUESTION_MOST, select_tokens, window_modality, window_span


@dataclass(frozen=True)
class CSP(Method):
    """Keep what the observation window attends to, self and cross (arXiv 2412.04652).

    Attributes
    ----------
    config : CSPConfig
        Which reading of it.
    """

    config: CSPConfig

    @property
    def decode_n(self) -> float:  # type: ignore[override]
        return self.config.decode_n

    @property
    def text_only(self) -> str:  # type: ignore[override]
        return self.config.text_only

    @property
    def delay(self) -> int:  # type: ignore[override]
        return self.config.delay

    @property
    def decode_interval(self) -> int | None:  # type: ignore[override]
        return self.config.decode_interval

    def observes(self, length: int) -> int:
        if self.config.hop:
            return length
        window = self.config.resolve(length).window
        return window if isinstance(window, int) else QUESTION_MOST

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        return _Selection(self.config, modality, longest, left_padded)


class _Selection(Selection):
    def __init__(self, config: CSPConfig, modality: Tensor, longest: int, left_padded: bool) -> None:
        self.sizes = config.resolve(longest)
        span = None if left_padded else window_span(modality, self.sizes)
        self.window = window_modality(modality, self.sizes, span=span)
        self.budget, self.prune_from = self.sizes.budget, self.sizes.prune_from
        self.observes = modality.shape[1] if self.sizes.hop else self.window.shape[1]
        self.exact = self.sizes.k_self is None
        if config.decode_interval is not None:
            self.renewal = _Renewal.of(self.sizes, config.decode_interval)

    def select(self, layer: Layer) -> Tensor:
        # A later turn may be shorter than the window: only its own queries are there to observe.
        window = self.window[:, max(0, self.window.shape[1] - layer.query.shape[2]) :]
        indices, _ = select_tokens(
            layer.query,
            layer.key,
            layer.modality,
            self.sizes,
            query_modality=window.to(layer.key.device),
            scale=layer.scale,
            causal=layer.causal,
            lse=layer.lse,
        )
        return indices


@dataclass(frozen=True)
class _Renewal(Renewal):
    sizes: ResolvedConfig

    @classmethod
    def of(cls, sizes: ResolvedConfig, interval: int) -> _Renewal:
        window = sizes.window if isinstance(sizes.window, int) else QUESTION_MOST
        # Queries further back stand among keys with gaps, where a position does not say what they saw.
        window = min(window, sizes.recent + interval)
        return cls(sizes.budget, sizes.recent, window, interval, sizes=sizes)

    def select(self, layer: Layer, there: Tensor) -> Tensor:
        # Tokens that a hop would ask have no query any more.
        sizes = replace(self.sizes, length=layer.modality.shape[1], hop=0)
        window = window_modality(layer.modality, sizes, span=there.shape[1])
        indices, _ = select_tokens(
            layer.query,
            layer.key,
            layer.modality,
            sizes,
            query_modality=window.masked_fill(~there, -1),
            scale=layer.scale,
            causal=layer.causal,
        )
        return indices
