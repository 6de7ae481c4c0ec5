"""The variants, by the letter of the idea that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from csp_ext.config import CSPConfig
from csp_ext.methods import CSP, H2O, Full, Method, Random, SnapKV
from variants.layers import AcrossLayers
from variants.scored import AcrossHeads, Asking, Scored
from variants.smoothing import Grid, Past, Smoothing, WholeImage

DEFAULT = "default"
IDEAS = {
    "a": "Smoothing of the scores",
    "b": "How self and cross share the budget",
    "c": "The second hop",
    "d": "Pruning after the first generated tokens",
    "e": "A zero slot with the dropped keys' weight",
    "f": "A slot with the dropped keys' weight and mean value",
    "g": "Budgets moved between heads and layers",
}
WITHOUT = "A method with a slot is compared with the same method without."
NOTES = {
    "c": "The default asks 0.45 of the slots that are not recent, for all heads together, looking both ways.",
    "d": "The tokens before the prune are kept beside the budget. They come from the full cache; "
    "from the third on, most are digits.",
    "e": WITHOUT,
    "f": WITHOUT,
    "g": "The same total, of slots that are filled: a layer whose heads differ is stored as wide as the "
    "widest. What a layer's budget does depends on where this small model looks up its answers: see the "
    "doubled ones.",
}


@dataclass(frozen=True)
class Variant:
    """A way to prune that is compared with another.

    Attributes
    ----------
    letters : str
        The ideas that it belongs to; empty for the default, which belongs to all.
    name : str
        Of its own.
    method : callable
        Takes the slots per row.
    slot : str
        Kind of the slot beside the kept keys, see :func:`variants.slots.with_slot`; empty: none.
    delay : int
        Tokens generated before the prune.
    reference : str
        Name of the variant that it is compared with.
    """

    letters: str
    name: str
    method: Callable[[int], Method]
    slot: str = ""
    delay: int = 0
    reference: str = DEFAULT


def _csp(slots: int, **fields: Any) -> Method:
    return CSP(CSPConfig(budget=slots, **fields))


def _smoothed(slots: int, smoothing: Smoothing) -> Method:
    return Scored(CSPConfig(budget=slots), smoothing=smoothing)


def _asking(slots: int, asking: Asking) -> Method:
    return Scored(CSPConfig(budget=slots), asking=asking)


def _across_heads(slots: int, floor: float) -> Method:
    return AcrossHeads(CSPConfig(budget=slots), floor=floor)


def _across_layers(slots: int, weights: tuple[float, ...]) -> Method:
    return AcrossLayers(CSPConfig(budget=slots), weights)


def _method(slots: int, kind: Callable[..., Method], **fields: Any) -> Method:
    return kind(budget=slots, **fields)


def _full(slots: int) -> Method:
    return Full()


def smoothings() -> Iterable[Variant]:
    """(a), against the maximum over a key and the 3 before it in its run."""
    yield Variant("a", "none", partial(_csp, pool="none"))
    for pool, kernel in (("max", 7), ("max", 5), ("avg", 7), ("past", 5), ("past", 9)):
        yield Variant("a", f"{pool} {kernel}", partial(_csp, pool=pool, pool_kernel=kernel))
    others: dict[str, Smoothing] = {
        "past 7 across runs": Past(within_run=False),
        "images 3 x 3, text past 7": Grid((-1, 1), (-1, 1)),
        "images 1 x 7, text past 7": Grid((0, 0), (-3, 3)),
        "past 7, in images along a row": Grid((0, 0), (-3, 0)),
        "past 7, images share 0.3 of their best": WholeImage(0.3),
        "past 7, images share their best": WholeImage(1.0),
    }
    for name, smoothing in others.items():
        yield Variant("a", name, partial(_smoothed, smoothing=smoothing))


def combinations() -> Iterable[Variant]:
    """(b), against the attention's own division."""
    for combine, ratio in (
        *(("calibrated", ratio) for ratio in (0.3, 0.5, 0.7)),
        ("union", 0.5),
        ("intersection", 0.5),
    ):
        yield Variant("b", f"{combine} {ratio}", partial(_csp, combine=combine, cross_ratio=ratio))


def hops() -> Iterable[Variant]:
    """(c), against one hop of 0.45, looking both ways, shared by the heads."""
    yield Variant("cd", "no hop", partial(_csp, hop=0))
    for share in (0.2, 0.3, 0.6, 0.8):
        yield Variant("c", f"hop {share}", partial(_csp, hop=share))
    askings = {
        "hop sees only what is before it": Asking(causal=True),
        "hop of each head": Asking(per_head=True),
        "two hops": Asking(times=2),
        "hop split by modality": Asking(split=True),
    }
    for name, asking in askings.items():
        yield Variant("c", name, partial(_asking, asking=asking))


def delays() -> Iterable[Variant]:
    """(d), against a prune right after the prompt."""
    for delay in (1, 2, 4):
        yield Variant("d", f"after {delay}", partial(_csp, delay=delay), delay=delay)
        yield Variant("d", f"after {delay}, no hop", partial(_csp, delay=delay, hop=0), delay=delay)


def slots() -> Iterable[Variant]:
    """(e) and (f), each against the same method without the slot."""
    snapkv = partial(_method, kind=SnapKV, window=8, recent=8, pool="max", pool_kernel=7)
    methods: dict[str, Callable[[int], Method]] = {
        DEFAULT: _csp,
        "snapkv w8 max 7": snapkv,
        "h2o": partial(_method, kind=H2O),
        "random": partial(_method, kind=Random),
    }
    for name, method in methods.items():
        if name != DEFAULT:
            yield Variant("ef", name, method)
        yield Variant("ef", f"{name}, n = 1", method, "one", reference=name)
        yield Variant("e", f"{name}, calibrated n", method, "calibrated", reference=name)
        yield Variant("f", f"{name}, residual slot", method, "residual", reference=name)


def budgets() -> Iterable[Variant]:
    """(g), against the same budget everywhere."""
    yield Variant("g", "between heads, floor 0.2", partial(_across_heads, floor=0.2))
    weights = {
        "first layer 0.4": (0.4, 1.2, 1.2, 1.2),
        "first layer 0.7": (0.7, 1.1, 1.1, 1.1),
        "pyramid": (1.45, 1.15, 0.85, 0.55),
        "second layer doubled": (2 / 3, 2.0, 2 / 3, 2 / 3),
        "third layer doubled": (2 / 3, 2 / 3, 2.0, 2 / 3),
    }
    for name, parts in weights.items():
        yield Variant("g", name, partial(_across_layers, weights=parts))


FULL = Variant("", "full cache", _full)


def variants(letters: str) -> list[Variant]:
    """Return the default and the variants of some letters, those that are put off last and in order."""
    every = [*smoothings(), *combinations(), *hops(), *delays(), *slots(), *budgets()]
    wanted = [variant for variant in every if set(variant.letters) & set(letters)]
    return [Variant("", DEFAULT, _csp), *sorted(wanted, key=lambda variant: variant.delay)]
