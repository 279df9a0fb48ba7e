"""ImageNet (ILSVRC 2012) from the two official tar files, without unpacking them.

`ILSVRC2012_img_train.tar` holds one tar file per class, `ILSVRC2012_img_val.tar` the validation
images, whose labels TFDS carries. A tar file stores its members as they are, so one pass over the
headers gives the place of every image, and the images are then read at will.
"""

import dataclasses
import io
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import cv2

from swat_jax.data import decode
from swat_jax.data.prepare import directory
from swat_jax.data.tfds_import import tensorflow_datasets
from swat_jax.errors import UsageError

TRAIN_ARCHIVE, VALIDATION_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SIZES = {"train": 1_281_167, "validation": 50_000}

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_JPEG_QUALITY = 100  # for the few images that are stored anew


@dataclasses.dataclass(frozen=True)
class Member:
    """One image in a tar file.

    Attributes:
      name: file name, such as n01440764_18.JPEG.
      label: name of its class, such as n01440764.
      offset: where it starts in the archive, bytes.
      size: bytes.
    """

    name: str
    label: str
    offset: int
    size: int


class ImagenetSplit:
    """One split as a `directory.Source`.

    Args:
      archive: the tar file.
      members: its images.
    """

    def __init__(self, archive: pathlib.Path, members: Sequence[Member]) -> None:
        self.keys = [member.name for member in members]
        self.num_bytes = sum(member.size for member in members)
        self._archive = archive
        self._members = members

    def example(self, index: int) -> dict[str, Any]:
        """One example."""
        member = self._members[index]
        with open(self._archive, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), member.size, member.offset)
        where = f"--archive: {self._archive}: {member.name}"
        if len(data) != member.size:
            raise UsageError(f"{where} is cut short; the archive is incomplete")
        return {
            "image": as_rgb_jpeg(data, where),
            "label": member.label,
            "file_name": member.name,
        }


def as_rgb_jpeg(data: bytes, name: str) -> bytes:
    """An image as it is, or stored anew where it is not a grey or RGB JPEG.

    ImageNet holds 22 CMYK JPEGs and one PNG file.

    Args:
      data: the file.
      name: for the error message.

    Raises:
      UsageError: it is no image.
    """
    header = decode.jpeg_header(data)
    if header is not None and header.components in (1, 3):
        return data
    image = decode.decode(data, 3, name)
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return encoded.tobytes()


def prepare(
    data_dir: pathlib.Path, archives: Sequence[pathlib.Path], *, complete: bool
) -> pathlib.Path:
    """Writes the TFDS directory.

    Args:
      data_dir: where TFDS directories are.
      archives: the two tar files, or a folder that holds both.
      complete: refuse archives with fewer images than the official ones.

    Returns:
      The directory.

    Raises:
      UsageError: an archive is missing or damaged.
      RunError: the disk failed.
    """
    train, validation = find_archives(archives)
    members = {
        "train": list(train_members(train)),
        "validation": list(validation_members(validation)),
    }
    for split, found in members.items():
        if complete and len(found) != SIZES[split]:
            raise UsageError(
                f"--archive: {split} must hold {SIZES[split]} images, holds {len(found)}; "
                "--no-verify takes it as it is"
            )
    splits = {
        "train": ImagenetSplit(train, members["train"]),
        "validation": ImagenetSplit(validation, members["validation"]),
    }
    return directory.write("imagenet2012", data_dir, splits, class_names={})


def find_archives(archives: Sequence[pathlib.Path]) -> tuple[pathlib.Path, pathlib.Path]:
    """The training and the validation archive.

    Args:
      archives: files, or folders that hold them.

    Raises:
      UsageError: one of them is not there.
    """
    found = []
    for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE):
        candidates = [path / name if path.is_dir() else path for path in archives]
        matching = [path for path in candidates if path.name == name and path.is_file()]
        if not matching:
            raise UsageError(
                f"--archive: {name} is not there; register at https://image-net.org, download it, "
                "and give the folder with both tar files: --archive FOLDER"
            )
        found.append(matching[0])
    return found[0], found[1]


def train_members(archive: pathlib.Path) -> Iterator[Member]:
    """The training images, class by class."""
    known = set(_label_file("labels.txt"))
    for inner in _members(archive, 0, archive.stat().st_size):
        synset = inner.name.removesuffix(".tar")
        if synset not in known or synset == inner.name:
            raise UsageError(f"--archive: {archive}: {inner.name} is no class of ImageNet")
        for image in _members(archive, inner.offset, inner.size):
            yield dataclasses.replace(image, label=synset)


def validation_members(archive: pathlib.Path) -> Iterator[Member]:
    """The validation images; the number in the name leads to the label."""
    labels = _label_file("validation_labels.txt")
    for image in _members(archive, 0, archive.stat().st_size):
        match = _VALIDATION_NAME.fullmatch(image.name)
        if not match or not 1 <= int(match[1]) <= len(labels):
            raise UsageError(
                f"--archive: {archive}: {image.name} is no validation image of ImageNet"
            )
        yield dataclasses.replace(image, label=labels[int(match[1]) - 1])


def _label_file(name: str) -> list[str]:
    path = tensorflow_datasets().core.tfds_path("datasets/imagenet2012") / name
    return path.read_text().split()


def _members(archive: pathlib.Path, start: int, size: int) -> Iterator[Member]:
    """Files in the tar file that takes `size` bytes of `archive` from `start` on."""
    try:
        with (
            open(archive, "rb", buffering=0) as file,
            # tarfile seeks over the contents: only headers are read.
            tarfile.open(fileobj=cast("BinaryIO", _Section(file, start, size)), mode="r:") as tar,
        ):
            for member in tar:
                if member.isfile():
                    name = member.name.rpartition("/")[2]
                    yield Member(name, "", start + member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"--archive: cannot read {archive}: {error}") from error


class _Section(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = os.pread(self._file.fileno(), wanted, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
