"""Augmentation of whole batches of small images on the host; `on_device.augment` is its twin."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

# Kind of augmentation: (pixels of black border that the crop may reach into, mirror half of them).
AUGMENTATIONS: dict[str, tuple[int, bool]] = {
    "none": (0, False),
    "crop_flip": (4, True),  # the usual one for CIFAR
    "shift": (1, False),  # for 8x8 digits: they would not survive a flip
}


@dataclasses.dataclass(frozen=True)
class Draw:
    """What chance decided for a batch.

    Attributes:
      padding: width of the black border.
      offsets: (B, 2) row and column, in the padded image, of the window that is cut out.
      mirrored: (B,) which windows are mirrored left to right.
    """

    padding: int
    offsets: NDArray[np.int64]
    mirrored: NDArray[np.bool_]

    def rows(self, rows: slice) -> "Draw":
        """The draw of some images of the batch."""
        return Draw(self.padding, self.offsets[rows], self.mirrored[rows])


def draw(rng: np.random.Generator, count: int, kind: str) -> Draw:
    """Draws windows that are uniform over all there are, half of them mirrored if `kind` flips.

    Args:
      rng: random numbers of this batch.
      count: images in the batch.
      kind: a key of `AUGMENTATIONS`.
    """
    padding, flip = AUGMENTATIONS[kind]
    offsets = rng.integers(0, 2 * padding + 1, (count, 2))
    mirrored = rng.random(count) < 0.5 if flip else np.zeros(count, bool)
    return Draw(padding, offsets, mirrored)


def apply(images: NDArray[np.uint8], drawn: Draw) -> NDArray[np.uint8]:
    """Pads each image with black, cuts out its window and mirrors it if it was drawn so.

    Args:
      images: (B, H, W, C).
      drawn: of B images.

    Returns:
      uint8 (B, H, W, C).
    """
    count, height, width = images.shape[:3]
    y = np.arange(height) + drawn.offsets[:, :1]
    x = np.arange(width) + drawn.offsets[:, 1:]
    x[drawn.mirrored] = x[drawn.mirrored, ::-1]
    border = (drawn.padding, drawn.padding)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    return padded[np.arange(count)[:, None, None], y[:, :, None], x[:, None, :]]
