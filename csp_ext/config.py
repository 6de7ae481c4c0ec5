"""CSPConfig: every choice in which the paper, its released code and this project may differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from csp_ext._fields import check_choice, check_int, check_real, check_size

HEADS = ("kv", "shared")
COMBINE = ("intersection", "union", "calibrated")
POOL = ("none", "max", "past", "avg")
TEXT_ONLY = ("prune", "leave")

EVEN = 0.5
HOP_MOST = 64  # tokens that a share may ask for, so that their scores cost what a window of 64 costs
# what the release does at cross_ratio <= 0, whatever the budget (METHODS A.2)
RELEASE_ZERO_K_SELF = 308
RELEASE_ZERO_K_CROSS = 1


def slots_of(budget: float | int | None, length: int) -> int:
    """Return T of a budget for a batch whose longest row has `length` real tokens.

    Raises
    ------
    ValueError, TypeError
        If it is neither a share in (0, 1] nor a positive int.
    """
    if not isinstance(budget, float):
        check_int("budget", budget, 1)
        return cast(int, budget)
    if not 0 < budget <= 1:
        raise ValueError(f"budget as a share must lie in (0, 1], got {budget}")
    # The small term keeps decimal shares exact: 0.29 * 100 is 28.999...
    return max(1, math.floor(budget * length + 1e-6))


@dataclass(frozen=True)
class ResolvedConfig:
    """A CSPConfig for prompts of one length: every size is an int.

    Attributes
    ----------
    config : CSPConfig
    length : int
        Real tokens of the batch's longest row, those of the delay included.
    budget, recent : int
        T and R.
    window : int or "question"
        Size of the observation window, or the rule that finds it.
    k_self, k_cross : int or None
        Literal quotas (Eq. 2), or None for the exact budget.
    prune_from : int
        Rows with fewer real tokens are left whole, as far as ``budget`` slots hold them.
    hop : int
        Tokens that are asked in turn what they attend to.
    """

    config: CSPConfig
    length: int
    budget: int
    recent: int
    window: int | str
    k_self: int | None
    k_cross: int | None
    prune_from: int
    hop: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether no row of at most ``length`` real tokens loses any."""
        return self.length < self.prune_from

    def score_options(self) -> dict[str, Any]:
        """Keyword arguments of ``score``, or of ``prune`` together with :meth:`select_options`."""
        return {"n": self.config.n, "heads": self.config.heads}

    def select_options(self) -> dict[str, Any]:
        """Keyword arguments of ``select``."""
        return {
            "budget": self.budget,
            "recent": self.recent,
            # One list given as both is ranked as it is by any ratio.
            "cross_ratio": EVEN if self.config.cross_ratio is None else self.config.cross_ratio,
            "combine": self.config.combine,
            "k_self": self.k_self,
            "k_cross": self.k_cross,
            "pool": self.config.pool,
            "pool_kernel": self.config.pool_kernel,
        }


@dataclass(frozen=True)
class CSPConfig:
    """How to prune. ``CSPConfig()`` is the default of the integration.

    Parameters
    ----------
    budget : float or int
        Slots per row, recent ones included. A float in (0, 1] is a share of the batch's longest prompt,
        rounded down, at least 1; an int is a number of tokens (so 1.0 keeps everything and 1 one token).
    window : int, "question" or "half"
        Which queries observe, counted from a row's last real token. "question": the text after the row's last
        image, at most its last 64 tokens; the last 8 tokens where an image ends the row. "half": budget // 2.
    recent : int or "half"
        How many of a row's last real tokens are always kept; at most the budget.
    heads : {"kv", "shared"}
        One kept set per KV head, or one for all heads.
    combine : {"intersection", "union", "calibrated"}
        How the self and the cross list share the budget, see ``csp_ext.select``.
    cross_ratio : float or None
        Share of the cross list, in [0, 1]. None: with "calibrated", the share that the attention itself has
        there, so that the two lists count as one; otherwise 0.5.
    k_self, k_cross : int, optional
        Literal sizes of the two lists (Eq. 2) instead of the exact budget. Both or neither.
    n : float
        n-softmax constant of the scores (Eq. 7).
    decode_n : float
        n-softmax constant of the attention over a pruned cache; 0 is the ordinary softmax.
    pool : {"none", "max", "past", "avg"}
        Smoothing of the scores; "past" raises what follows a high score, as copying reads it next.
    pool_kernel : int
        Odd width of the smoothing; "past" takes its first half and the key itself.
    hop : float or int
        How many of the tokens that the window attends to most are asked in turn what they attend to: evidence
        that only other evidence names. A float is a share of the slots that are not recent ones, at most 64
        tokens, an int a number of tokens, 0 none. Only tokens whose queries are at hand are asked.
    delay : int
        How many tokens ``generate()`` appends to the prompt before pruning; they are kept, and their queries
        join the window. Until then the cache is whole.
    decode_interval : int, optional
        The integration prunes again, back to the budget, before more tokens than these follow a prune: no row
        ever has more than the budget and these (Algorithm 1 prunes in every iteration). The last queries
        decide, those of generated tokens included; there is no hop. None: a cache is pruned once.
    text_only : {"prune", "leave"}
        What the transformers integration does with a row that holds no image; the ops prune it.
    hh_ratio, recent_ratio, recent_bias : float, optional
        The release's arithmetic, see :meth:`release`. With ``hh_ratio`` and ``recent_ratio`` the fields
        ``budget``, ``window``, ``recent``, ``k_self`` and ``k_cross`` follow from them and must be None.

    Raises
    ------
    ValueError, TypeError
        Naming the field and its value.
    """

    budget: float | int | None = 0.2
    window: int | str | None = 8
    recent: int | str | None = 8
    heads: str = "kv"
    combine: str = "calibrated"
    cross_ratio: float | None = None
    k_self: int | None = None
    k_cross: int | None = None
    n: float = 1.0
    decode_n: float = 0.0
    pool: str = "past"
    pool_kernel: int = 7
    hop: float | int = 0.45
    delay: int = 0
    decode_interval: int | None = None
    text_only: str = "prune"
    hh_ratio: float | None = None
    recent_ratio: float | None = None
    recent_bias: float = 1.0

    def __post_init__(self) -> None:
        check_choice("heads", self.heads, HEADS)
        check_choice("combine", self.combine, COMBINE)
        check_choice("pool", self.pool, POOL)
        check_choice("text_only", self.text_only, TEXT_ONLY)
        if self.cross_ratio is not None:
            check_real("cross_ratio", self.cross_ratio, 0, 1)
        check_real("n", self.n, 0, math.inf)
        check_real("decode_n", self.decode_n, 0, math.inf)
        check_real("recent_bias", self.recent_bias, 0, math.inf)
        check_int("delay", self.delay, 0)
        check_int("pool_kernel", self.pool_kernel, 1)
        check_real("hop", self.hop, 0, 1 if isinstance(self.hop, float) else math.inf)
        if self.decode_interval is not None:
            check_int("decode_interval", self.decode_interval, 1)
            if self.text_only == "leave":
                raise ValueError(
                    'decode_interval must be None beside text_only="leave", which keeps whole rows'
                )
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be odd, got {self.pool_kernel}")
        if (self.hh_ratio is None) != (self.recent_ratio is None):
            raise ValueError(
                f"hh_ratio and recent_ratio go together, got {self.hh_ratio} and {self.recent_ratio}"
            )
        if self.hh_ratio is not None:
            self._check_release()
        else:
            self._check_sizes()

    def _check_release(self) -> None:
        check_real("hh_ratio", self.hh_ratio, 0, 1)
        check_real("recent_ratio", self.recent_ratio, 0, 1)
        for name in ("budget", "window", "recent", "k_self", "k_cross"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be None beside hh_ratio, got {getattr(self, name)!r}")
        for name in ("hop", "delay", "decode_interval"):
            if getattr(self, name):
                raise ValueError(f"{name} must be off beside hh_ratio, got {getattr(self, name)}")
        if self.combine == "calibrated":
            raise ValueError('combine must be "union" or "intersection" beside hh_ratio, got "calibrated"')

    def _check_sizes(self) -> None:
        if self.recent_bias != 1:
            raise ValueError(f"recent_bias needs hh_ratio and recent_ratio, got {self.recent_bias}")
        slots_of(self.budget, 1)
        check_size("window", self.window, 1, ("question", "half"))
        check_size("recent", self.recent, 0, ("half",))
        if (self.k_self is None) != (self.k_cross is None):
            raise ValueError(f"k_self and k_cross go together, got {self.k_self} and {self.k_cross}")
        if self.k_self is None:
            return
        check_int("k_self", self.k_self, 0)
        check_int("k_cross", self.k_cross, 0)
        if self.combine == "calibrated":
            raise ValueError('k_self and k_cross do not go with combine="calibrated"')
        if isinstance(self.budget, int):
            self.resolve(self.budget)

    @property
    def undivided(self) -> bool:
        """Whether the attention itself divides the budget, and both lists count as one."""
        return self.combine == "calibrated" and self.cross_ratio is None

    @classmethod
    def paper(cls, budget: float | int = 0.2, cross_ratio: float = 0.5) -> CSPConfig:
        """The paper's reading: one set for all heads, intersection, n-softmax also in decode."""
        return cls(
            budget=budget,
            window="half",
            recent="half",
            heads="shared",
            combine="intersection",
            cross_ratio=cross_ratio,
            decode_n=1.0,
            pool="none",
            hop=0,
        )

    @classmethod
    def release(
        cls,
        hh_ratio: float = 0.1,
        recent_ratio: float = 0.1,
        recent_bias: float = 1.0,
        cross_ratio: float = 0.5,
    ) -> CSPConfig:
        """The released code's reading: per head, truncated quotas, union, without its duplicates.

        With hh = trunc(hh_ratio L) and R = trunc(recent_ratio L) the window is the last R queries, the recent
        keys are the last trunc(R recent_bias), and the rest of hh + R is split by ``cross_ratio``, truncating
        both parts; ``cross_ratio`` 0 means the release's literal 308 self keys and 1 cross key. A row is
        pruned from hh + R real tokens on.
        """
        return cls(
            budget=None,
            window=None,
            recent=None,
            combine="union",
            cross_ratio=cross_ratio,
            pool="none",
            hop=0,
            text_only="leave",
            hh_ratio=hh_ratio,
            recent_ratio=recent_ratio,
            recent_bias=recent_bias,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CSPConfig:
        """Build a config from a mapping of field names, such as :meth:`to_dict` gives."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"CSPConfig has no field {name!r}; its fields are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain, JSON-serialisable dict."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> CSPConfig:
        """Return a copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **changes})

    def resolve(self, length: int) -> ResolvedConfig:
        """Turn shares and rules into sizes for a batch whose longest row has ``length`` real tokens.

        Raises
        ------
        ValueError
            Where ``k_self`` and ``k_cross`` do not fit the budget, or the release would fail on this length.
        """
        if self.hh_ratio is not None and self.recent_ratio is not None:
            return self._resolve_release(length, self.hh_ratio, self.recent_ratio)
        budget = slots_of(cast("int | float", self.budget), max(1, length - self.delay))
        half = max(1, budget // 2)
        recent = min(half if self.recent == "half" else cast(int, self.recent), budget) + self.delay
        window = half if self.window == "half" else cast("int | str", self.window)
        if isinstance(window, int):
            window += self.delay
        budget += self.delay
        prune_from = budget + 1
        if self.k_self is not None and self.k_cross is not None:
            quotas = (self.k_self, self.k_cross)
            if recent + (sum(quotas) if self.combine == "union" else min(quotas)) > budget:
                raise ValueError(
                    f"k_self = {self.k_self} and k_cross = {self.k_cross} with recent = {recent} "
                    f"do not fit a budget of {budget}"
                )
            prune_from = budget
        hop = self.hop
        if isinstance(hop, float):
            hop = min(HOP_MOST, math.ceil(hop * (budget - recent)))
        return ResolvedConfig(
            self, length, budget, recent, window, self.k_self, self.k_cross, prune_from, hop
        )

    def _resolve_release(self, length: int, hh_ratio: float, recent_ratio: float) -> ResolvedConfig:
        window = int(length * recent_ratio)
        cache = int(length * hh_ratio) + window
        if length < cache or window == 0:
            # the release returns the whole cache
            return ResolvedConfig(self, length, length, 0, window, None, None, length + 1)
        recent = window if self.recent_bias == 1 else int(window * self.recent_bias)
        rest = cache - recent
        ratio = EVEN if self.cross_ratio is None else self.cross_ratio
        k_cross, k_self = int(rest * ratio), int(rest * (1 - ratio))
        where = f"recent_bias = {self.recent_bias} with {cache} slots and a window of {window}"
        if rest < 0:
            raise ValueError(f"{where} asks for {recent} recent tokens: the release fails here")
        if recent == 0 and rest > 0:
            raise ValueError(f"{where} leaves no recent token: the release fails here")
        if self.cross_ratio == 0:
            k_self, k_cross = RELEASE_ZERO_K_SELF, RELEASE_ZERO_K_CROSS
            if length - recent < k_self:
                raise ValueError(
                    f"cross_ratio = 0 selects {k_self} self keys in the release, "
                    f"got a prompt with {length - recent} candidates"
                )
        return ResolvedConfig(self, length, k_self + k_cross + recent, recent, window, k_self, k_cross, cache)
