"""A folder of images, one folder per class.

Either `train/CLASS/...` and `val/CLASS/...` (also `validation` or `test`), as ImageNet is usually
unpacked, or one `CLASS/...` level, of which `config.data.test_fraction` becomes the test set.
Labels follow the sorted names of the classes.
"""

import os
import pathlib

import numpy as np
from absl import logging
from numpy.typing import NDArray

from swat_jax.data.records import Record, RecordDataset
from swat_jax.data.settings import Settings
from swat_jax.errors import UsageError

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
TRAIN_FOLDER = "train"
TEST_FOLDERS = ("val", "validation", "test")


class FolderRecords:
    """The files of some class folders; a `Records`."""

    def __init__(self, paths: list[str], labels: list[int]) -> None:
        self._paths = paths
        self._labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Record:
        """One file."""
        path = self._paths[index]
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        return Record(data, int(self._labels[index]), path)

    def labels(self) -> NDArray[np.int32]:
        """The class of every file."""
        return self._labels


def load(settings: Settings) -> RecordDataset:
    """Lists the folder at `config.data.data_dir`; files are opened when they are needed.

    Args:
      settings: checked config.

    Raises:
      UsageError: no such folder, no classes in it, an empty class, or classes that differ between
        training and test.
    """
    root = settings.directory
    if not root.is_dir():
        raise UsageError(f"config.data.data_dir: source 'folder' needs a folder, got {str(root)!r}")
    if not (root / TRAIN_FOLDER).is_dir():
        classes = _class_names(root)
        train, test = _list(root, classes), None
    else:
        test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if test_root is None:
            raise UsageError(
                f"config.data.data_dir: {root} has {TRAIN_FOLDER}/ but none of "
                f"{', '.join(f'{name}/' for name in TEST_FOLDERS)}"
            )
        classes = _class_names(root / TRAIN_FOLDER)
        different = set(classes) ^ set(_class_names(test_root))
        if different:
            raise UsageError(
                f"config.data.data_dir: class {min(different)!r} is in only one of "
                f"{root / TRAIN_FOLDER} and {test_root}"
            )
        train, test = _list(root / TRAIN_FOLDER, classes), _list(test_root, classes)
    return RecordDataset(settings, name=root.name, class_names=classes, train=train, test=test)


def _class_names(root: pathlib.Path) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if len(names) < 2:
        raise UsageError(
            f"config.data.data_dir: {root} must hold one folder of images per class, at least 2; "
            f"found {len(names)}"
        )
    return tuple(names)


def _list(root: pathlib.Path, classes: tuple[str, ...]) -> FolderRecords:
    """Files by class and name."""
    paths: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        first = len(paths)
        for folder, folders, files in os.walk(root / name, followlinks=True):
            folders.sort()
            for file in sorted(files):
                if file.startswith("."):
                    continue
                known = os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
                (paths if known else others).append(os.path.join(folder, file))
        if first == len(paths):
            raise UsageError(
                f"config.data.data_dir: class folder {root / name} holds no image "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        labels += [label] * (len(paths) - first)
    if others:
        logging.warning(
            "%d files under %s do not end like an image and are not used, such as %s",
            len(others),
            root,
            others[0],
        )
    return FolderRecords(paths, labels)
