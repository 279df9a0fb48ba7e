"""Decoding, windows and resampling against formulas written out here."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swat_jax.data import decode
from swat_jax.errors import UsageError
from tests.data.archives import cmyk_jpeg
from tests.data.configs import encode, random_images, smooth_image


def bilinear(image, height, width):
    """Bilinear resampling in float64, pixel centres at half-integers, edges repeated."""

    def weights(source, target):
        matrix = np.zeros((target, source))
        for row in range(target):
            position = (row + 0.5) * source / target - 0.5
            low = math.floor(position)
            for index, weight in ((low, low + 1 - position), (low + 1, position - low)):
                matrix[row, min(max(index, 0), source - 1)] += weight
        return matrix

    y, x = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ij,jkc,lk->ilc", y, image.astype(np.float64), x, optimize=True)


def uniform(*, seed=0):
    return np.random.default_rng(seed).random((decode.ATTEMPTS, decode.DRAWS))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_colours_come_in_the_order_red_green_blue(suffix):
    image = np.zeros((16, 16, 3), np.uint8)
    image[...] = (200, 100, 30)
    result = decode.center_crop(encode(image, suffix), 16, 3, "x", margin=False)
    np.testing.assert_allclose(result, image, atol=6)


def test_lossless_images_stay_as_they_are():
    image = random_images(1, size=32)[0]
    assert np.array_equal(
        decode.center_crop(encode(image, ".png"), 32, 3, "x", margin=False), image
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_convert(channels):
    grey = smooth_image(20, 24)[..., 0]
    result = decode.decode(encode(grey, ".png"), channels, "x")
    assert np.array_equal(result, np.repeat(grey[..., None], channels, -1))


def test_a_colour_image_becomes_grey():
    image = smooth_image(20, 24)
    result = decode.decode(encode(image, ".png"), 1, "x")
    np.testing.assert_allclose(result[..., 0], image @ [0.299, 0.587, 0.114], atol=1)


def test_transparency_and_16_bits_are_dropped():
    image = random_images(1, size=8, channels=4)[0]
    assert np.array_equal(decode.decode(encode_bgra(image), 3, "x")[..., ::-1], image[..., :3])
    deep = cv2.imencode(".png", image[..., 0].astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(decode.decode(deep, 1, "x")[..., 0], image[..., 0])


def encode_bgra(image):
    return cv2.imencode(".png", np.ascontiguousarray(image[..., [2, 1, 0, 3]]))[1].tobytes()


def test_cmyk():
    header = decode.jpeg_header(cmyk_jpeg())
    assert header == (8, 8, 4)
    result = decode.decode(cmyk_jpeg(), 3, "x")
    # Every component is 128 of 255: RGB is (1 - C)(1 - K), about a quarter.
    np.testing.assert_allclose(result, 64, atol=2)


def with_orientation(jpeg, orientation):
    """Adds an EXIF segment that asks viewers to turn the image."""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00" + bytes([orientation]) + b"\x00\x00"
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x01" + entry + b"\x00\x00\x00\x00"
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def test_exif_orientation_is_ignored():
    jpeg = encode(smooth_image(20, 40))
    turned = with_orientation(jpeg, 6)
    # The segment is right: OpenCV turns the image where it is not told to ignore it.
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (40, 20, 3)
    assert np.array_equal(decode.decode(turned, 3, "x"), decode.decode(jpeg, 3, "x"))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduction(reduction):
    image = smooth_image(81, 120)
    result = decode.decode(encode(image), 3, "x", reduction)[..., ::-1]
    height, width = math.ceil(81 / reduction), math.ceil(120 / reduction)
    assert result.shape == (height, width, 3)
    padded = np.pad(image, ((0, height * reduction - 81), (0, 0), (0, 0)), mode="edge")
    blocks = padded.reshape(height, reduction, width, reduction, 3).mean((1, 3))
    np.testing.assert_allclose(result[:-1], blocks[:-1], atol=6)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3]))
def test_header(height, width, channels):
    image = np.zeros((height, width, channels), np.uint8)
    jpeg = encode(image if channels == 3 else image[..., 0])
    assert decode.jpeg_header(jpeg) == (height, width, channels)
    assert decode.jpeg_header(with_orientation(jpeg, 6)) == (height, width, channels)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\0" * 20, b"GIF89a"]
)
def test_header_of_something_else(data):
    assert decode.jpeg_header(data) is None


def with_preview(jpeg):
    """Adds a whole small JPEG to the headers, as cameras do: it brings an end marker."""
    segment = b"Exif\0\0" + encode(smooth_image(6, 8))
    return jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]


WITH_PREVIEW = with_preview(encode(smooth_image(50, 50)))
PIXELS = WITH_PREVIEW.rfind(b"\xff\xda")


def test_the_end_of_a_preview_is_not_that_of_the_image(monkeypatch):
    """Whatever OpenCV says: before version 5 it returns an image without its lower rows."""
    assert decode.decode(WITH_PREVIEW, 3, "x").shape == (50, 50, 3)
    monkeypatch.setattr(decode.cv2, "imdecode", lambda *_: np.zeros((50, 50, 3), np.uint8))
    for length in (PIXELS - 30, PIXELS, PIXELS + 5, PIXELS + 300, len(WITH_PREVIEW) - 2):
        assert b"\xff\xd9" in WITH_PREVIEW[:length]
        with pytest.raises(UsageError, match=rf"^x: the JPEG is truncated \({length} bytes\)"):
            decode.decode(WITH_PREVIEW[:length], 3, "x")
    for data in (WITH_PREVIEW, WITH_PREVIEW + b"\0" * 50_000):
        assert decode.decode(data, 3, "x").shape == (50, 50, 3)


BAD_IMAGES = {
    "empty": b"",
    "text": b"not an image at all",
    "jpeg cut in half": encode(smooth_image(50, 50))[:900],
    "jpeg without its end": encode(smooth_image(50, 50))[:-2],
    "only a jpeg start": b"\xff\xd8\xff\xd9",
    "png cut in half": encode(random_images(1, size=20)[0], ".png")[:700],
}


@pytest.mark.parametrize("data", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_unreadable_images_are_named(data):
    for read in (
        lambda: decode.center_crop(data, 8, 3, "folder/broken.jpg", margin=True),
        lambda: decode.random_resized_crop(data, uniform(), False, 8, 3, "folder/broken.jpg"),
    ):
        with pytest.raises(UsageError, match=r"^folder/broken\.jpg: .*(replace|OpenCV)"):
            read()


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 10**6))
def test_window_is_inside_and_has_an_allowed_shape(height, width, seed):
    window = decode.draw_window(uniform(seed=seed), height, width)
    assert window.height >= 1
    assert window.width >= 1
    assert 0 <= window.top <= height - window.height
    assert 0 <= window.left <= width - window.width
    # Rounding moves each side by half a pixel.
    low = (window.width - 0.5) / (window.height + 0.5)
    high = (window.width + 0.5) / max(window.height - 0.5, 0.5)
    if min(height, width) > 8 and 3 / 4 <= width / height <= 4 / 3:
        assert low <= 4 / 3
        assert high >= 3 / 4
        assert (window.height + 0.5) * (window.width + 0.5) >= 0.08 * height * width


def test_window_distribution():
    height, width, count = 300, 400, 4000
    draws = np.random.default_rng(0).random((count, decode.ATTEMPTS, decode.DRAWS))
    windows = np.array([decode.draw_window(draw, height, width) for draw in draws])
    area = windows[:, 2] * windows[:, 3] / (height * width)
    ratio = windows[:, 3] / windows[:, 2]
    # Where every shape fits the area is uniform: up to 0.5, a 4:3 or 3:4 window fits into 4:3.
    small = area[area < 0.5]
    edges = np.linspace(0.08, 0.5, 8)
    counts = np.histogram(small, edges)[0]
    expected = len(small) / 7
    assert np.all(np.abs(counts - expected) < 5 * math.sqrt(expected))
    # The logarithm of the ratio is uniform, also where the area is small.
    logs = np.log(ratio[area < 0.5])
    edges = np.linspace(math.log(3 / 4), math.log(4 / 3), 6)
    counts = np.histogram(np.clip(logs, edges[0] + 1e-9, edges[-1] - 1e-9), edges)[0]
    expected = len(logs) / 5
    assert np.all(np.abs(counts - expected) < 5 * math.sqrt(expected))
    # Places are uniform over what is free.
    free = height - windows[:, 2]
    places = (windows[free > 20, 0] + 0.5) / (free[free > 20] + 1)
    assert abs(places.mean() - 0.5) < 5 / math.sqrt(12 * len(places))
    assert places.min() < 0.02
    assert places.max() > 0.98


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (30, 41)])
def test_fallback_is_central(height, width):
    never = np.tile([0.999999, 0.5, 0, 0], (decode.ATTEMPTS, 1))  # nearly all of the area: no fit
    top, left, crop_height, crop_width = decode.draw_window(never, height, width)
    assert crop_height == min(height, round(width * 4 / 3))
    assert crop_width == min(width, round(height * 4 / 3))
    assert top == (height - crop_height) // 2
    assert left == (width - crop_width) // 2


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_random_resized_crop(suffix, mirror):
    image = smooth_image(90, 120)
    size = 48  # nothing shrinks to half: exact
    draws = uniform(seed=3)
    top, left, height, width = decode.draw_window(draws, 90, 120)
    assert min(height, width) < 2 * size
    result = decode.random_resized_crop(encode(image, suffix), draws, mirror, size, 3, "x")
    expected = bilinear(image[top : top + height, left : left + width], size, size)
    expected = expected[:, ::-1] if mirror else expected
    atol = 1.1 if suffix == ".png" else 8
    np.testing.assert_allclose(result, expected, atol=atol)


def test_random_resized_crop_of_a_large_jpeg_shows_the_same_window():
    image = smooth_image(900, 1200)
    draws = uniform(seed=3)
    top, left, height, width = decode.draw_window(draws, 900, 1200)
    assert min(height, width) >= 4 * 64
    result = decode.random_resized_crop(encode(image), draws, False, 64, 3, "x")
    expected = bilinear(image[top : top + height, left : left + width], 64, 64)
    np.testing.assert_allclose(result, expected, atol=6)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (56, 56), (200, 300)])
def test_evaluation_takes_the_centre_of_the_resized_image(height, width):
    image = smooth_image(height, width)
    size = 49  # the shorter side becomes 56
    result = decode.center_crop(encode(image, ".png"), size, 3, "x", margin=True)
    scale = 56 / min(height, width)
    resized = bilinear(image, int(height * scale), int(width * scale))
    top = round((resized.shape[0] - size) / 2)
    left = round((resized.shape[1] - size) / 2)
    np.testing.assert_allclose(result, resized[top : top + size, left : left + size], atol=1.1)


def test_evaluation_sizes_of_imagenet(monkeypatch):
    jpeg = encode(smooth_image(375, 500))
    asked = []
    resize = cv2.resize
    monkeypatch.setattr(
        decode.cv2,
        "resize",
        lambda image, size, **kw: asked.append(size) or resize(image, size, **kw),
    )
    decode.center_crop(jpeg, 224, 3, "x", margin=True)
    assert asked == [(341, 256)]
