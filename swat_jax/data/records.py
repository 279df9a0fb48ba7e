"""Data sets of encoded images, decoded when they are needed."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from swat_jax.data import augment, decode, stratify
from swat_jax.data.base import BaseDataset
from swat_jax.data.in_memory import Arrays
from swat_jax.data.interface import Batch, Info, Split
from swat_jax.data.settings import RANDOM_RESIZED_CROP, Settings
from swat_jax.errors import UsageError

# What `arrays` may put into memory, and a device after that.
MAX_ARRAY_BYTES = 4 << 30


class Record(NamedTuple):
    """One encoded image.

    Attributes:
      data: the file.
      label: its class.
      name: where it is, for error messages.
    """

    data: bytes
    label: int
    name: str


# From an encoded image and its row in the batch to uint8 (H, W, C).
DecodeOne = Callable[[Record, int], NDArray[np.uint8]]


class Records(Protocol):
    """Random access to encoded images; reading must be safe from several threads."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """One image."""
        ...

    def labels(self) -> NDArray[np.int32]:
        """The class of every image (N,); may have to read all of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the images of a `Records`.

    Attributes:
      records: where they are.
      indices: which of them.
    """

    records: Records
    indices: NDArray[np.int64]

    @classmethod
    def whole(cls, records: Records) -> "Part":
        """All of them."""
        return cls(records, np.arange(len(records)))

    def divide(self, fraction: float) -> tuple["Part", "Part"]:
        """What stays and a stratified `fraction` (0 < fraction < 1), always the same one."""
        labels = self.records.labels()[self.indices]
        count = stratify.part_size(fraction, len(labels))
        rest, chosen = stratify.stratified(labels, count)
        return (
            Part(self.records, self.indices[rest]),
            Part(self.records, self.indices[chosen]),
        )


class RecordDataset(BaseDataset):
    """A `Dataset` over encoded images.

    Args:
      settings: checked config.
      name: for messages.
      class_names: one per class.
      train: the training set; `settings.holdout` of it is held out.
      test: the test set; None: `settings.test_fraction` of the training set.

    Raises:
      UsageError: batch or hold-out too large.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        class_names: tuple[str, ...],
        train: Records,
        test: Records | None,
    ) -> None:
        self._parts = _divide(settings, train, test)
        size = settings.image_size
        info = Info(
            name=name,
            num_classes=len(class_names),
            image_shape=(size, size, settings.channels),
            num_train=len(self._parts["train"].indices),
            num_holdout=len(self._parts["holdout"].indices),
            num_test=len(self._parts["test"].indices),
            mean=settings.mean,
            std=settings.std,
            class_names=class_names,
        )
        super().__init__(settings, info)

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """See `Dataset.arrays`."""
        size = self._size(split)
        num_bytes = size * int(np.prod(self.info.image_shape))
        if num_bytes > MAX_ARRAY_BYTES:
            raise UsageError(
                f"config.data.on_device: {size} images of {self.info.name} need "
                f"{num_bytes / 2**30:.1f} GiB, the limit is {MAX_ARRAY_BYTES / 2**30:.1f}; set "
                "--config.data.on_device=False"
            )
        part = self._parts[split]
        whole = decode_all(part, self.info.image_shape, self._decode_still)
        return whole.images, whole.labels

    def _decode_still(self, record: Record, row: int) -> NDArray[np.uint8]:
        """An image as in evaluation."""
        del row
        size, _, channels = self.info.image_shape
        margin = self.settings.augmentation == RANDOM_RESIZED_CROP
        return decode.center_crop(record.data, size, channels, record.name, margin=margin)

    def _train_batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        settings = self.settings
        share = self._share(settings.batch_size)
        if settings.augmentation != RANDOM_RESIZED_CROP:
            batch = self._eval_batch("train", indices)
            drawn = augment.draw(rng, settings.batch_size, settings.augmentation)
            return {
                "image": augment.apply(batch["image"], drawn.rows(share)),
                "label": batch["label"],
            }
        windows = rng.random((settings.batch_size, decode.ATTEMPTS, decode.DRAWS))[share]
        mirrored = rng.random(settings.batch_size)[share] < 0.5
        size, _, channels = self.info.image_shape

        def crop(record: Record, row: int) -> NDArray[np.uint8]:
            return decode.random_resized_crop(
                record.data, windows[row], bool(mirrored[row]), size, channels, record.name
            )

        return _fill(self._parts["train"], indices, self.info.image_shape, crop)

    def _eval_batch(self, split: Split, indices: NDArray[np.int64]) -> Batch:
        return _fill(self._parts[split], indices, self.info.image_shape, self._decode_still)


def decode_all(
    part: Part,
    image_shape: tuple[int, int, int],
    decode_one: DecodeOne,
) -> Arrays:
    """Decodes images with all cores.

    Args:
      part: which images.
      image_shape: height, width and channels of what `decode_one` returns.
      decode_one: decodes one image.
    """
    size = len(part.indices)
    whole = Arrays(np.empty((size, *image_shape), np.uint8), np.empty(size, np.int32))
    chunks = np.array_split(np.arange(size), max(1, size // 256))

    def fill(chunk: NDArray[np.int64]) -> None:
        batch = _fill(part, chunk, image_shape, decode_one)
        whole.images[chunk], whole.labels[chunk] = batch["image"], batch["label"]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, chunks))
    return whole


def _fill(
    part: Part,
    indices: NDArray[np.int64],
    image_shape: tuple[int, int, int],
    decode_one: DecodeOne,
) -> Batch:
    """Reads and decodes some images of a part, in order."""
    images = np.empty((len(indices), *image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(part.indices[indices].tolist()):
        record = part.records.read(index)
        images[row], labels[row] = decode_one(record, row), record.label
    return {"image": images, "label": labels}


def _divide(settings: Settings, train: Records, test: Records | None) -> Mapping[str, Part]:
    """Training, held-out and test images."""
    training = Part.whole(train)
    if test is None:
        training, testing = training.divide(settings.test_fraction)
    else:
        testing = Part.whole(test)
    held_out = Part(train, np.arange(0))
    if settings.holdout:
        training, held_out = training.divide(settings.holdout)
    return {"train": training, "holdout": held_out, "test": testing}
