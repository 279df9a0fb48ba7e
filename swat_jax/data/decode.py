"""Encoded images to uint8 arrays of one size: OpenCV, in the thread that calls.

Resampling is bilinear. Where an image is to shrink to half or less, the JPEG decoder is asked for
1/2, 1/4 or 1/8 of the size: that is a box filter in front of the bilinear one, and less work.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from swat_jax.errors import UsageError

# RandomResizedCrop of the paper's ImageNet recipe.
AREA = (0.08, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10
DRAWS = 4  # uniform numbers per attempt

# Evaluation: the shorter side becomes image_size * 256 / 224 pixels.
RESIZE_SIDE, CROP_SIDE = 256, 224

# Batches are prepared in parallel; threads of OpenCV's own would only compete with those.
cv2.setNumThreads(1)

_REDUCED = {
    1: (cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR),
    2: (cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_COLOR_2),
    4: (cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_COLOR_4),
    8: (cv2.IMREAD_REDUCED_GRAYSCALE_8, cv2.IMREAD_REDUCED_COLOR_8),
}

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
# Where the end of a JPEG is looked for; some cameras write more after it.
_JPEG_TAIL = 1 << 16
# Markers that start a frame and hold its size (C4, C8 and CC mean other things).
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN_MARKER = 0xDA  # the coded pixels follow


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Jpeg(NamedTuple):
    """What the header of a JPEG says."""

    height: int
    width: int
    components: int


def jpeg_header(data: bytes) -> Jpeg | None:
    """Reads the size from a JPEG without decoding it; None: not a JPEG, or a broken one.

    Args:
      data: the file.
    """
    for marker, position in _segments(data):
        if marker in _FRAME_MARKERS and position + 10 <= len(data):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return Jpeg(height, width, data[position + 9]) if height and width else None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each header of a JPEG, as far as one follows the other."""
    position = 2
    while data[:2] == _JPEG_START and position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no payload
            position += 2
        else:
            yield marker, position
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _is_cut(data: bytes) -> bool:
    """Whether a JPEG lacks its end. A preview image in its headers has an end too: not that one."""
    begin = end = 2
    for marker, begin in _segments(data):
        end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
        if marker == _SCAN_MARKER:
            break
    else:
        if end > 2 and end + 2 > len(data):
            return True  # within the headers
        begin = 2  # they are not in order: the decoder may find its way all the same
    return data.rfind(_JPEG_END, max(begin, len(data) - _JPEG_TAIL)) < 0


def decode(data: bytes, channels: int, name: str, reduction: int = 1) -> NDArray[np.uint8]:
    """Decodes an image of any format that OpenCV reads; the orientation that EXIF notes is ignored.

    Args:
      data: the file.
      channels: 1: grey; 3: colour. Grey, CMYK, palette and transparent images are converted.
      name: the file, for the error message.
      reduction: 1, 2, 4 or 8: a JPEG is decoded at this part of its size.

    Returns:
      uint8 (H, W, channels), blue first (`_finish` swaps).

    Raises:
      UsageError: not an image, a truncated one, or one whose damage the decoder notices (wrong
        pixels in the middle of a JPEG are none that it does).
    """
    if data[:2] == _JPEG_START and _is_cut(data):
        raise UsageError(f"{name}: the JPEG is truncated ({len(data)} bytes); replace the file")
    flags = _REDUCED[reduction][channels == 3] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        raise UsageError(f"{name}: {'; '.join(str(error).split(chr(10)))}") from error
    if image is None:
        raise UsageError(f"{name}: cannot be decoded ({len(data)} bytes); replace or remove it")
    return image if channels == 3 else image[..., None]


def draw_window(uniform: NDArray[np.float64], height: int, width: int) -> Window:
    """RandomResizedCrop's window: area uniform, aspect ratio log-uniform, place uniform.

    Up to `ATTEMPTS` shapes are tried until one fits; then the largest central window with an
    allowed ratio is taken.

    Args:
      uniform: (ATTEMPTS, DRAWS) uniform in [0, 1).
      height: of the image, pixels.
      width: of the image, pixels.
    """
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    for area, ratio, y, x in uniform.tolist():
        target = (AREA[0] + area * (AREA[1] - AREA[0])) * height * width
        aspect = math.exp(log_ratio[0] + ratio * (log_ratio[1] - log_ratio[0]))
        crop_width = round(math.sqrt(target * aspect))
        crop_height = round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(y * (height - crop_height + 1))
            left = int(x * (width - crop_width + 1))
            return Window(top, left, crop_height, crop_width)
    crop_width = min(width, max(1, round(height * RATIO[1])))
    crop_height = min(height, max(1, round(width / RATIO[0])))
    return Window((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def random_resized_crop(
    data: bytes, uniform: NDArray[np.float64], mirror: bool, size: int, channels: int, name: str
) -> NDArray[np.uint8]:
    """Decodes an image and resizes a random window of it.

    Args:
      data: the file.
      uniform: (ATTEMPTS, DRAWS) uniform in [0, 1); they choose the window.
      mirror: flip left to right.
      size: height and width of the result.
      channels: 1 or 3.
      name: the file, for the error message.

    Returns:
      uint8 (size, size, channels), RGB.

    Raises:
      UsageError: the image cannot be decoded.
    """
    header = jpeg_header(data)
    if header is None:
        image = decode(data, channels, name)
        window = draw_window(uniform, *image.shape[:2])
    else:
        window = draw_window(uniform, header.height, header.width)
        reduction = _reduction(min(window.height, window.width) / size)
        image = decode(data, channels, name, reduction)
        window = _scale(window, header, image.shape)
    bottom, right = window.top + window.height, window.left + window.width
    cut = image[window.top : bottom, window.left : right]
    resized: Any = cv2.resize(cut, (size, size), interpolation=cv2.INTER_LINEAR)
    return _finish(cv2.flip(resized, 1) if mirror else resized, channels)


def center_crop(
    data: bytes, size: int, channels: int, name: str, *, margin: bool
) -> NDArray[np.uint8]:
    """Decodes an image, resizes its shorter side and cuts out the centre.

    Args:
      data: the file.
      size: height and width of the result.
      channels: 1 or 3.
      name: the file, for the error message.
      margin: the shorter side becomes size * 256 / 224 pixels (the counterpart of
        `random_resized_crop`); otherwise `size`, and an image of that size stays as it is.

    Returns:
      uint8 (size, size, channels), RGB.

    Raises:
      UsageError: the image cannot be decoded.
    """
    short_side = round(size * RESIZE_SIDE / CROP_SIDE) if margin else size
    header = jpeg_header(data)
    if header is None:
        image = decode(data, channels, name)
        height, width = image.shape[:2]
    else:
        height, width = header.height, header.width
        reduction = _reduction(min(height, width) / short_side)
        image = decode(data, channels, name, reduction)
    shorter = min(height, width)
    height, width = (max(short_side, int(side * short_side / shorter)) for side in (height, width))
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _finish(image[top : top + size, left : left + size], channels)


def _reduction(shrink: float) -> int:
    """The largest size reduction that still leaves something to shrink."""
    return next((factor for factor in (8, 4, 2) if shrink >= factor), 1)


def _scale(window: Window, header: Jpeg, shape: tuple[int, ...]) -> Window:
    """The window in an image that was decoded at another size than its header's."""
    y, x = shape[0] / header.height, shape[1] / header.width
    top, left = round(window.top * y), round(window.left * x)
    bottom = round((window.top + window.height) * y)
    right = round((window.left + window.width) * x)
    return Window(top, left, max(1, bottom - top), max(1, right - left))


def _finish(image: Any, channels: int) -> NDArray[np.uint8]:
    """RGB from OpenCV's BGR; a channel axis for grey images."""
    if channels == 1:
        return image.reshape(*image.shape[:2], 1)
    rgb: Any = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb
