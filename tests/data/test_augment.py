"""Host and device augmentation against loops over pixels, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax.data import augment, on_device
from swat_jax.data.augment import AUGMENTATIONS
from swat_jax.errors import UsageError
from tests.data.configs import random_images

SIZE = 6


def by_loops(image, top, left, mirrored, padding):
    """Pixel by pixel: the window that starts at (top, left) of the padded image."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y = y + top - padding
            source_x = (width - 1 - x if mirrored else x) + left - padding
            if 0 <= source_y < height and 0 <= source_x < width:
                out[y, x] = image[source_y, source_x]
    return out


def all_outcomes(image, kind):
    """Every image that the augmentation can make, by its bytes, with its (top, left, mirrored)."""
    padding, flip = AUGMENTATIONS[kind]
    places = range(2 * padding + 1)
    return {
        by_loops(image, top, left, mirrored, padding).tobytes(): (top, left, mirrored)
        for top in places
        for left in places
        for mirrored in ((False, True) if flip else (False,))
    }


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_apply_equals_a_loop_over_pixels(kind):
    images = random_images(40, size=SIZE)
    drawn = augment.draw(np.random.default_rng(0), len(images), kind)
    assert drawn.padding == AUGMENTATIONS[kind][0]
    expected = [
        by_loops(image, *offset, mirrored, drawn.padding)
        for image, offset, mirrored in zip(images, drawn.offsets, drawn.mirrored, strict=True)
    ]
    result = augment.apply(images, drawn)
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected)


def test_rows_of_a_draw_are_those_of_the_whole_batch():
    images = random_images(10, size=SIZE)
    drawn = augment.draw(np.random.default_rng(0), 10, "crop_flip")
    part = augment.apply(images[4:7], drawn.rows(slice(4, 7)))
    assert np.array_equal(part, augment.apply(images, drawn)[4:7])


def host_outcomes(image, kind, count):
    drawn = augment.draw(np.random.default_rng(1), count, kind)
    return augment.apply(np.repeat(image[None], count, 0), drawn)


def device_outcomes(image, kind, count):
    images = jnp.repeat(jnp.asarray(image)[None], count, 0)
    return np.asarray(jax.jit(on_device.augment, static_argnums=2)(jax.random.key(1), images, kind))


@pytest.mark.parametrize("outcomes", [host_outcomes, device_outcomes])
@pytest.mark.parametrize("kind", ["shift", "crop_flip"])
def test_every_outcome_is_equally_likely(kind, outcomes):
    image = random_images(1, size=SIZE)[0]
    possible = all_outcomes(image, kind)
    padding, flip = AUGMENTATIONS[kind]
    assert len(possible) == (2 * padding + 1) ** 2 * (2 if flip else 1)
    mean = 60
    made = outcomes(image, kind, mean * len(possible))
    seen = [possible[one.tobytes()] for one in made]  # a KeyError: not one of the possible
    counts = np.array([seen.count(one) for one in possible.values()])
    # Poisson, roughly: the statistic's mean is the degrees of freedom, its deviation sqrt(2 of it).
    statistic = np.sum((counts - mean) ** 2 / mean)
    freedom = len(possible) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip"])
def test_device_keeps_shape_and_dtype(kind):
    images = jnp.asarray(random_images(4))
    result = on_device.augment(jax.random.key(0), images, kind)
    assert (result.shape, result.dtype) == (images.shape, jnp.uint8)
    if kind == "none":
        assert np.array_equal(result, images)


def test_device_refuses_what_it_cannot():
    with pytest.raises(UsageError, match="'random_resized_crop'"):
        on_device.augment(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8), "random_resized_crop"
        )


def test_device_order_is_a_permutation_per_epoch():
    epoch_order = jax.jit(on_device.epoch_order, static_argnums=1)
    orders = [
        np.asarray(epoch_order(jax.random.key(seed), 50, e)) for seed in (0, 1) for e in (0, 1)
    ]
    assert all(sorted(one) == list(range(50)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize(dtype):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = random_images(3)
    result = on_device.normalize(jnp.asarray(images), mean, std, dtype)
    assert result.dtype == dtype
    exact = (images.astype(np.float64) / 255 - mean) / std
    bound = 1e-6 if dtype == jnp.float32 else 2**-8 * np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=0, atol=bound)
