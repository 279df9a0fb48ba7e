"""CIFAR-10 and CIFAR-100 from the binary archives.

A record is one label byte (CIFAR-100: the coarse label, then the fine one) and 3 * 32 * 32 bytes:
red, green and blue plane, row by row.
"""

import dataclasses
import pathlib
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from swat_jax.data.prepare import directory
from swat_jax.data.prepare.download import Archive
from swat_jax.errors import UsageError

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is where in an archive.

    Attributes:
      archive: the official file.
      folder: folder in the archive.
      splits: files of each split.
      names: files with the class names, by label feature, in the order of the label bytes.
      num_classes: by label feature.
      sizes: images of each split.
    """

    archive: Archive
    folder: str
    splits: dict[str, tuple[str, ...]]
    names: dict[str, str]
    num_classes: dict[str, int]
    sizes: dict[str, int]


_URL = "https://www.cs.toronto.edu/~kriz/"
LAYOUTS = {
    "cifar10": Layout(
        archive=Archive(
            url=_URL + "cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            num_bytes=170_052_171,
        ),
        folder="cifar-10-batches-bin",
        splits={
            "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        names={"label": "batches.meta.txt"},
        num_classes={"label": 10},
        sizes={"train": 50_000, "test": 10_000},
    ),
    "cifar100": Layout(
        archive=Archive(
            url=_URL + "cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            num_bytes=168_513_733,
        ),
        folder="cifar-100-binary",
        splits={"train": ("train.bin",), "test": ("test.bin",)},
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        num_classes={"coarse_label": 20, "label": 100},
        sizes={"train": 50_000, "test": 10_000},
    ),
}


class CifarSplit:
    """One split as a `directory.Source`: images become PNG files.

    Args:
      split: "train" or "test".
      records: uint8 (N, labels + pixels).
      label_features: which label each leading byte is.
    """

    def __init__(
        self, split: str, records: NDArray[np.uint8], label_features: Sequence[str]
    ) -> None:
        self.keys = range(len(records))
        self.num_bytes = records.size  # more than the PNG files will need
        self._split = split
        self._labels = records[:, : len(label_features)]
        self._pixels = records[:, len(label_features) :].reshape(-1, 3, _SIDE, _SIDE)
        self._label_features = label_features

    def example(self, index: int) -> dict[str, Any]:
        """One example; the id counts in the order of the archive, as the stock builder's does."""
        blue_first = np.ascontiguousarray(self._pixels[index, ::-1].transpose(1, 2, 0))
        _, encoded = cv2.imencode(".png", blue_first)
        labels = map(int, self._labels[index])
        return {
            "id": f"{self._split}_{index:05d}",
            "image": encoded.tobytes(),
            **dict(zip(self._label_features, labels, strict=True)),
        }


def prepare(
    name: str, data_dir: pathlib.Path, archive: pathlib.Path, *, complete: bool
) -> pathlib.Path:
    """Writes the TFDS directory of an archive.

    Args:
      name: "cifar10" or "cifar100".
      data_dir: where TFDS directories are.
      archive: the binary archive.
      complete: refuse an archive with fewer images than the official one.

    Returns:
      The directory.

    Raises:
      UsageError: the file is not such an archive.
      RunError: the disk failed.
    """
    layout = LAYOUTS[name]
    members = _read(archive, layout)
    class_names = {
        feature: members[file].decode().split() for feature, file in layout.names.items()
    }
    for feature, names in class_names.items():
        if len(names) != layout.num_classes[feature]:
            raise UsageError(
                f"--archive: {archive}: {layout.names[feature]} must hold "
                f"{layout.num_classes[feature]} names, holds {len(names)}"
            )
    splits = {}
    for split, files in layout.splits.items():
        records = np.concatenate([_records(archive, file, members[file], layout) for file in files])
        if complete and len(records) != layout.sizes[split]:
            raise UsageError(
                f"--archive: {archive}: {split} must hold {layout.sizes[split]} images, holds "
                f"{len(records)}; --no-verify takes it as it is"
            )
        splits[split] = CifarSplit(split, records, tuple(layout.names))
    return directory.write(name, data_dir, splits, class_names)


def _read(archive: pathlib.Path, layout: Layout) -> dict[str, bytes]:
    """Contents of the files that are needed, by name."""
    wanted = {file for files in layout.splits.values() for file in files}
    wanted |= set(layout.names.values())
    found = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                content = tar.extractfile(member)
                if folder == layout.folder and file in wanted and content is not None:
                    found[file] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UsageError(f"--archive: cannot read {archive}: {error}") from error
    if wanted - set(found):
        missing = ", ".join(sorted(wanted - set(found)))
        raise UsageError(f"--archive: {archive} lacks {missing} in {layout.folder}/")
    return found


def _records(archive: pathlib.Path, file: str, content: bytes, layout: Layout) -> NDArray[np.uint8]:
    """The records of a file (N, labels + pixels), its labels checked."""
    width = len(layout.names) + _PIXEL_BYTES
    if not content or len(content) % width:
        raise UsageError(
            f"--archive: {archive}: {file} must be records of {width} bytes, has {len(content)}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, width)
    for column, (feature, count) in enumerate(layout.num_classes.items()):
        highest = records[:, column].max()
        if highest >= count:
            raise UsageError(
                f"--archive: {archive}: {file}: {feature} must be 0 to {count - 1}, got {highest}"
            )
    return records
