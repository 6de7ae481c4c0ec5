"""What a pruning method is: it says which tokens of a prompt each layer keeps, and may merge the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer of a complete prompt, as a method sees it.

    Attributes
    ----------
    query : Tensor
        [B, Hq, Q, D], the last Q queries of the prompt, after RoPE; at least what the method observes, as
        far as the forward that completed the prompt had them.
    key, value : Tensor
        [B, Hkv, L, D], the whole prompt.
    modality : Tensor
        [B, L] int8, -1 padding.
    index, count : int
        Which of the prunable layers this is, and how many there are.
    scale : float or None
        Of the attention logits; None: ``D ** -0.5``.
    causal : bool
        Whether a query sees only keys at or before its position.
    lse : Tensor or None
        [B, Hq, Q], the natural log-sum-exp of each query's logits over the keys that it sees, in the dtype of
        the scores; None where the attention did not say.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    modality: Tensor
    index: int
    count: int
    scale: float | None
    causal: bool
    lse: Tensor | None = None


@dataclass(frozen=True)
class Renewal(ABC):
    """How to prune once more what a prune has left and what came since.

    Attributes
    ----------
    budget : int
        T, slots per row after each prune.
    recent : int
        R, how many last tokens each prune keeps.
    window : int
        O, how many last queries are looked at, at most.
    interval : int
        m, tokens from one prune to the next: a row never has more than T + m.
    """

    budget: int
    recent: int
    window: int
    interval: int

    @abstractmethod
    def select(self, layer: Layer, there: Tensor) -> Tensor:
        """Return the kept slots, int32 [B, Hs, T], ascending, -1 free at the left.

        Parameters
        ----------
        layer : Layer
            The stored tokens; its queries are the last ones, and belong to its last keys.
        there : Tensor
            bool [B, O], which of the queries are at hand.
        """


class Selection(ABC):
    """A method's decisions on one prompt, for all of its layers.

    Attributes
    ----------
    budget : int
        T, slots per row; the mean over the layers where they differ.
    prune_from : int
        Rows with fewer real tokens are left whole.
    observes : int
        How many of the prompt's last queries are looked at.
    exact : bool
        Whether a row of at least `prune_from` tokens fills every slot.
    renewal : Renewal or None
        How to prune again while the answer grows; None: never.
    merges : bool
        Whether :meth:`merge` does anything.
    """

    renewal: Renewal | None = None
    merges: bool = False
    budget: int
    prune_from: int
    observes: int
    exact: bool

    @abstractmethod
    def select(self, layer: Layer) -> Tensor:
        """Return the kept positions, int32 [B, Hs, slots], ascending, -1 free at the left."""

    def merge(self, layer: Layer, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put something of the dropped tokens into the kept ones.

        Parameters
        ----------
        layer : Layer
            The whole prompt.
        slots : Tensor
            int32 [B, Hs, slots], what stands in each slot, -1: zeros.
        key, value : Tensor
            [B, Hkv, slots, D], compacted; may be changed in place.

        Returns
        -------
        tuple
            The tensors to keep.
        """
        return key, value


class Method(ABC):
    """A way to prune, independent of any prompt.

    Attributes
    ----------
    decode_n : float
        n-softmax constant of the attention over a pruned cache (Eq. 7); 0 is the ordinary softmax.
    text_only : {"prune", "leave"}
        What happens to a row without images.
    delay : int
        How many tokens ``generate()`` appends to the prompt before pruning.
    decode_interval : int or None
        How many tokens may follow a prune before the next one; None: there is no next one.
    """

    decode_n: float = 0.0
    text_only: str = "prune"
    delay: int = 0
    decode_interval: int | None = None

    @abstractmethod
    def observes(self, length: int) -> int:
        """Return how many of a prompt's last queries may be looked at, for a prompt of `length` tokens."""

    @abstractmethod
    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        """Decide on a prompt.

        Parameters
        ----------
        modality : Tensor
            [B, L] int8, -1 padding.
        longest : int
            Real tokens of the longest row.
        left_padded : bool
            Whether all padding stands at the left.
        """
