"""The UCI handwritten digits that come with scikit-learn: no download.

1,797 grey images of 8x8 pixels in 10 classes, split for good into 1,437 for training and 360 for
the test, each class in proportion.
"""

import numpy as np

from swat_jax.data import stratify
from swat_jax.data.in_memory import Arrays, InMemoryDataset
from swat_jax.data.settings import Settings

TEST_IMAGES = 360

# The set counts ink in 4x4 blocks: 0 to 16.
_DARKEST = 16


def load(settings: Settings) -> InMemoryDataset:
    """Loads the digits.

    Args:
      settings: checked config.

    Raises:
      UsageError: the config does not fit 8x8 grey images, or the batch is too large.
    """
    from sklearn.datasets import load_digits  # imported late: it takes a second

    values, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(values) * (255 / _DARKEST)).astype(np.uint8)
    both = Arrays(images.reshape(-1, 8, 8, 1), np.asarray(labels, np.int32))
    train, test = stratify.stratified(both.labels, TEST_IMAGES)
    return InMemoryDataset(
        settings,
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        train=both.take(train),
        test=both.take(test),
    )
