"""Deterministic stratified splits."""

import numpy as np
from numpy.typing import NDArray

# Not `config.seed`: runs that differ in their seed must hold out the same images.
_SPLIT_SEED = 1797


def part_size(fraction: float, total: int) -> int:
    """Images in a part of a set: at least one where the fraction is not 0.

    Args:
      fraction: in [0, 1).
      total: images in the set.
    """
    return max(1, round(fraction * total)) if fraction else 0


def stratified(
    labels: NDArray[np.integer], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chooses `count` images so that the classes keep their shares.

    Every class gives its share of `count` rounded down; what is missing comes from the classes with
    the largest remainders. Within a class the choice is random and always the same.

    Args:
      labels: (N,) class of every image.
      count: how many to choose, 0 to N.

    Returns:
      The indices that were not chosen and those that were, both ascending.

    Example:
      >>> rest, chosen = stratified(np.array([0, 0, 0, 0, 1, 1]), 3)
      >>> np.asarray([0, 0, 0, 0, 1, 1])[chosen].tolist()
      [0, 0, 1]
    """
    classes, members = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(members * count, max(len(labels), 1))
    missing = count - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = np.zeros(len(labels), bool)
    for label, share in zip(classes, shares, strict=True):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:share]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
