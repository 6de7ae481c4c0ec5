"""Which samples are generated together."""

from __future__ import annotations

from csp_ext.evaluation.items import Dataset, Item

# Generated one by one, whatever fits.
SINGLE = ("MMCoQA", "GPR1200")


def batches(dataset: Dataset, batch_image: int) -> list[tuple[Item, ...]]:
    """Group the samples of a data set for generation.

    Parameters
    ----------
    dataset : Dataset
        Its samples keep their order within a group.
    batch_image : int
        How many images a group may hold; a sample with more is a group of its own. MileBench takes 24.

    Returns
    -------
    list of tuple of Item
        Each with one number of images, as many as before truncation; small numbers first.

    Raises
    ------
    ValueError
        If `batch_image` is not positive.
    """
    if batch_image < 1:
        raise ValueError(f"batch_image must be at least 1, got {batch_image}")
    alike: dict[int, list[Item]] = {}
    for item in dataset.samples:
        alike.setdefault(len(item.images), []).append(item)
    groups = []
    for images, items in sorted(alike.items()):
        size = 1 if dataset.name in SINGLE else max(batch_image // max(images, 1), 1)
        groups += [tuple(items[at : at + size]) for at in range(0, len(items), size)]
    return groups
