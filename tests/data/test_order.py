"""Order of an epoch and stratified splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swat_jax.data import order
from swat_jax.data.stratify import part_size, stratified


@pytest.mark.parametrize("size", [1, 2, 1437])
def test_every_epoch_is_a_permutation(size):
    for epoch in range(3):
        assert sorted(order.epoch_order(3, epoch, size)) == list(range(size))


def test_epochs_and_seeds_have_their_own_order():
    orders = [order.epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 4
    assert np.array_equal(orders[1], order.epoch_order(0, 1, 50))


def test_first_images_are_spread_evenly():
    firsts = [order.epoch_order(seed, 0, 4)[0] for seed in range(2000)]
    counts = np.bincount(firsts, minlength=4)
    # 500 expected; standard deviation 19.
    assert counts.min() > 400
    assert counts.max() < 600


def test_augmentation_has_numbers_of_its_own_per_step():
    draws = {
        order.augmentation_rng(*key).random()
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    }
    assert len(draws) == 5
    assert order.augmentation_rng(5, 6, 7).random() == order.augmentation_rng(5, 6, 7).random()


@given(st.data())
def test_stratified_keeps_the_shares(data):
    labels = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=60)))
    count = data.draw(st.integers(0, len(labels)))
    rest, chosen = stratified(labels, count)
    assert sorted([*rest, *chosen]) == list(range(len(labels)))
    assert len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    for label in np.unique(labels):
        exact = count * np.mean(labels == label)
        assert abs(np.sum(labels[chosen] == label) - exact) < 1
    assert np.array_equal(stratified(labels, count)[1], chosen)


def test_stratified_choice_is_not_the_first_ones():
    _, chosen = stratified(np.zeros(1000, int), 100)
    assert 400 < chosen.mean() < 600


@pytest.mark.parametrize(("fraction", "size"), [(0, 0), (0.001, 1), (0.1, 10), (0.126, 13)])
def test_part_size(fraction, size):
    assert part_size(fraction, 100) == size
