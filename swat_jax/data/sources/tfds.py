"""Classification sets in TFDS directories, read without TensorFlow.

`array_record` files are read through `tfds` data sources, `tfrecord` files through an index of our
own. Sets of small images of one size are decoded into memory, others image by image.
"""

import difflib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swat_jax.data import decode, prepare
from swat_jax.data.base import BaseDataset
from swat_jax.data.in_memory import InMemoryDataset, check_image_shape
from swat_jax.data.records import MAX_ARRAY_BYTES, Part, Record, RecordDataset, decode_all
from swat_jax.data.settings import RANDOM_RESIZED_CROP, Settings
from swat_jax.data.tfds_import import tensorflow_datasets
from swat_jax.data.tfrecord import TfRecordFiles
from swat_jax.errors import UsageError

# The first of these that is there and has labels.
TEST_SPLITS = ("test", "validation")

# Features that say which image a record holds.
_NAME_FEATURES = ("file_name", "filename", "id", "image/filename")


class RawRecords(Protocol):
    """Serialised examples by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> bytes: ...


class TfdsRecords:
    """The examples of one split; a `Records`.

    Args:
      raw: serialised examples.
      where: data set and split, for messages.
      image: name of the image feature.
      label: name of the label feature.
      num_classes: labels are below this.
    """

    def __init__(
        self, raw: RawRecords, where: str, *, image: str, label: str, num_classes: int
    ) -> None:
        proto: Any = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2
        self._raw = raw
        self._where = where
        self._image = image
        self._label = label
        self._num_classes = num_classes
        self._parse = proto.Example.FromString

    def __len__(self) -> int:
        return len(self._raw)

    def read(self, index: int) -> Record:
        """One example; only the image and the label of it are looked at."""
        try:
            features = self._parse(self._raw[index]).features.feature
            data = features[self._image].bytes_list.value[0]
            label = features[self._label].int64_list.value[0]
        except UsageError:
            raise
        except Exception as error:  # the reader's and the parser's errors share no base class
            reason = "; ".join(str(error).split("\n"))
            raise UsageError(f"{self._where}, record {index}: damaged ({reason})") from error
        name = next((features[key] for key in _NAME_FEATURES if key in features), None)
        text = name.bytes_list.value[0].decode() if name and name.bytes_list.value else ""
        where = f"{self._where}, record {index}" + (f" ({text})" if text else "")
        if not 0 <= label < self._num_classes:
            raise UsageError(f"{where}: label must be 0 to {self._num_classes - 1}, got {label}")
        return Record(data, label, where)

    def labels(self) -> NDArray[np.int32]:
        """The class of every example; reads the whole split."""
        return np.asarray([self.read(index).label for index in range(len(self))], np.int32)


def load(settings: Settings) -> BaseDataset:
    """Opens `config.data.name` in `config.data.data_dir`.

    Args:
      settings: checked config.

    Raises:
      UsageError: no such set, not prepared, incomplete, or not a classification set.
    """
    if not settings.name:
        raise UsageError("config.data.name: source 'tfds' needs a TFDS name, such as cifar10")
    builder = _open(settings.name, settings.directory)
    info = builder.info
    image, label = _find_features(settings.name, info)
    class_names = tuple(info.features[label].names or ())
    if len(class_names) != info.features[label].num_classes:
        class_names = tuple(str(number) for number in range(info.features[label].num_classes))

    def records(split: str) -> TfdsRecords:
        where = f"{settings.name} {split}"
        raw = _raw_records(builder, split)
        return TfdsRecords(raw, where, image=image, label=label, num_classes=len(class_names))

    if "train" not in info.splits:
        raise UsageError(
            f"config.data.name: {settings.name} has no split 'train'; it has "
            f"{', '.join(info.splits)}"
        )
    train = records("train")
    test = next((found for found in map(records, _test_splits(info)) if _has_labels(found)), None)
    common: dict[str, Any] = {"name": settings.name, "class_names": class_names}
    shape = info.features[image].shape
    channels = shape[-1]
    if channels != settings.channels:
        raise UsageError(
            f"config.data.mean: the images of {settings.name} have {channels} channel(s), got "
            f"{settings.channels} number(s)"
        )
    if test is None or None in shape or settings.augmentation == RANDOM_RESIZED_CROP:
        return RecordDataset(settings, train=train, test=test, **common)
    check_image_shape(settings.name, shape, settings)
    if max(len(train), len(test)) * int(np.prod(shape)) > MAX_ARRAY_BYTES:
        return RecordDataset(settings, train=train, test=test, **common)

    def whole(record: Record, row: int) -> NDArray[np.uint8]:
        del row
        size, channels = settings.image_size, settings.channels
        return decode.center_crop(record.data, size, channels, record.name, margin=False)

    return InMemoryDataset(
        settings,
        train=decode_all(Part.whole(train), shape, whole),
        test=decode_all(Part.whole(test), shape, whole),
        **common,
    )


def _open(name: str, data_dir: pathlib.Path) -> Any:
    """A read-only builder of the newest version there is."""
    tfds = tensorflow_datasets()
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=str(data_dir))
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        base = name.split("/")[0].split(":")[0]
        if base in prepare.DATASETS:
            fix = f"run python -m swat_jax.data.prepare {base} --data_dir {data_dir}"
        elif base in known:
            fix = f"run tfds build {base} --data_dir {data_dir} --file_format array_record"
        else:
            near = difflib.get_close_matches(base, known)
            fix = f"did you mean {' or '.join(near)}?" if near else "check the name"
            raise UsageError(
                f"config.data.name: TFDS has no {name!r} and {data_dir} neither; {fix}"
            ) from error
        raise UsageError(
            f"config.data.data_dir: {name} is not prepared in {data_dir}; {fix}"
        ) from error
    except ValueError as error:  # the base of DatasetNotFoundError, so it comes last
        raise UsageError(
            f"config.data.name: must look like NAME, NAME/CONFIG or NAME:VERSION, got {name!r}"
        ) from error


def _test_splits(info: Any) -> list[str]:
    return [split for split in TEST_SPLITS if split in info.splits]


def _find_features(name: str, info: Any) -> tuple[str, str]:
    """The image and the label of a set that has one of each."""
    tfds = tensorflow_datasets()

    def names(kind: type) -> list[str]:
        features = info.features.items() if hasattr(info.features, "items") else ()
        return [key for key, feature in features if isinstance(feature, kind)]

    images, labels = names(tfds.features.Image), names(tfds.features.ClassLabel)
    keys = info.supervised_keys
    if keys and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        image, label = keys
    elif len(images) == 1 and len(labels) == 1:
        image, label = images[0], labels[0]
    else:
        raise UsageError(
            f"config.data.name: {name} is not a set of images with one label each; its features "
            f"are {', '.join(sorted(info.features))}"
        )
    feature = info.features[image]
    if np.dtype(feature.np_dtype) != np.uint8 or feature.shape[-1] not in (1, 3):
        raise UsageError(
            f"config.data.name: the images of {name} must be uint8 with 1 or 3 channels, they are "
            f"{feature.np_dtype} {feature.shape}"
        )
    return image, label


def _has_labels(records: TfdsRecords) -> bool:
    """Some sets publish their test images without labels (-1)."""
    if not len(records):
        return False
    try:
        records.read(0)
    except UsageError:
        return False
    return True


def _raw_records(builder: Any, split: str) -> RawRecords:
    """The serialised examples of a split, all its files present."""
    tfds = tensorflow_datasets()
    found = builder.info.splits[split]
    paths: Sequence[pathlib.Path] = [pathlib.Path(path) for path in found.filepaths]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"config.data.data_dir: {path} is missing; prepare the set again")
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        return TfRecordFiles(paths, found.shard_lengths)
    if file_format != "array_record":
        raise UsageError(
            f"config.data.data_dir: {builder.data_path} holds {file_format} files; array_record "
            "and tfrecord can be read"
        )
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        return builder.as_data_source(split, deserialize_method=raw)
    except Exception as error:
        reason = "; ".join(str(error).split("\n"))
        raise UsageError(
            f"config.data.data_dir: cannot read {builder.data_path}: {reason}"
        ) from error
