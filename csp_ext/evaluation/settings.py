"""How an evaluation is run."""

from __future__ import annotations

from dataclasses import dataclass

from csp_ext.evaluation.prompts import TEMPLATES

PROTOCOLS = ("aware", "agnostic")


@dataclass(frozen=True)
class Settings:
    """How to run an evaluation.

    Attributes
    ----------
    protocol : {"aware", "agnostic"}
        "aware": the whole prompt is pruned, so a method can look at the question; the first generated token
        never depends on the arm. "agnostic": what stands before the question is pruned, shares of the budget
        are of that part, and the question runs over the pruned cache.
    seeds : tuple of int
        Of the generated suite and of random choices.
    batch_images : int
        How many images a batch may hold.
    max_new_tokens : int
        Most tokens to generate; fewer where the answers are known to be short.
    template : str
        See :func:`csp_ext.evaluation.prompts.assemble`.
    context_len : int or None
        What instruction and context are cut to; None: never.
    """

    protocol: str = "aware"
    seeds: tuple[int, ...] = (0,)
    batch_images: int = 24
    max_new_tokens: int = 512
    template: str = "plain"
    context_len: int | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.template not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {self.template!r}")
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed, got none")
        for name in ("batch_images", "max_new_tokens", "context_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
