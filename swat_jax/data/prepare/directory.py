"""Writes the standard TFDS directory of a data set, in `array_record` files, without TensorFlow.

The stock builders need TensorFlow to encode images and to shuffle through temporary files. Here a
builder with their metadata gets encoded images, in the order in which theirs would come out (by the
hash of the key), so nothing has to be shuffled on disk.
"""

import concurrent.futures
import functools
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from swat_jax.data.tfds_import import tensorflow_datasets
from swat_jax.errors import RunError, UsageError

_READERS = 8
# Disk space asked for, relative to the images: they are stored as they are, with a few bytes each.
_SPACE_FACTOR = 1.05


class Source(Protocol):
    """The images of one split.

    Attributes:
      keys: what the stock builder takes for the key of each example; sets the order.
      num_bytes: of all encoded images, about.
    """

    num_bytes: int

    @property
    def keys(self) -> Sequence[int | str]: ...

    def example(self, index: int) -> dict[str, Any]:
        """One example by the names of its features; must be safe from several threads."""
        ...


def builder_class(name: str) -> Any:
    """The stock builder of a data set: its name, version and features."""
    return tensorflow_datasets().builder_cls(name)


def existing(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """The directory of a set that is prepared already, in the stock builder's version."""
    path = data_dir / name / str(builder_class(name).VERSION)
    return path if (path / "dataset_info.json").exists() else None


def write(
    name: str,
    data_dir: pathlib.Path,
    splits: Mapping[str, Source],
    class_names: Mapping[str, Sequence[str]],
) -> pathlib.Path:
    """Writes a data set; either all of it appears, or nothing.

    Args:
      name: TFDS name.
      data_dir: the set goes to `data_dir/name/version`.
      splits: what goes into each split.
      class_names: names of the labels, by label feature; features that have them are left out.

    Returns:
      The directory.

    Raises:
      UsageError: not enough space, or an image of the archive is damaged.
      RunError: the disk failed.
    """
    tfds = tensorflow_datasets()
    stock = builder_class(name)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _check_space(data_dir, splits)
        builder = _make_class(tfds, stock, splits)(
            data_dir=str(data_dir), file_format="array_record"
        )
        for feature, names in class_names.items():
            builder.info.features[feature].names = list(names)
        builder.download_and_prepare()
    except OSError as error:
        raise RunError(f"cannot write to {data_dir}: {error.strerror or error}") from error
    return pathlib.Path(builder.data_path)


def _make_class(tfds: Any, stock: Any, splits: Mapping[str, Source]) -> Any:
    """A builder with the stock one's metadata that writes `splits` shard by shard."""

    def shard_iterators(self: Any, dl_manager: Any) -> dict[str, list[Callable[[], Iterator]]]:
        del self, dl_manager
        return {split: _shards(split, source) for split, source in splits.items()}

    # Not to be found under the stock name by who asks tfds for it later in this process.
    with tfds.core.registered.skip_registration():
        return type(
            stock.__name__,
            (tfds.core.dataset_builder.ShardBasedBuilder, stock),
            {
                "__module__": stock.__module__,
                "name": stock.name,
                "_shard_iterators_per_split": shard_iterators,
            },
        )


def _shards(split: str, source: Source) -> list[Callable[[], Iterator[tuple[Any, Any]]]]:
    """One generator per file, in the order that TFDS's own shuffling gives."""
    from tensorflow_datasets.core import hashing
    from tensorflow_datasets.core.utils import shard_utils

    hasher = hashing.Hasher(split)
    ordered = sorted(range(len(source.keys)), key=lambda index: hasher.hash_key(source.keys[index]))
    count = shard_utils.ShardConfig().get_number_shards(source.num_bytes, len(ordered))
    ends = shard_utils.get_shard_boundaries(len(ordered), count)
    starts = (0, *ends[:-1])
    return [
        functools.partial(_shard, split, source, ordered[start:end], number, count)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1)
    ]


def _shard(
    split: str, source: Source, indices: list[int], number: int, count: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Keys and examples of one file, read ahead."""
    print(f"{split}: file {number} of {count}, {len(indices)} images", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        examples = pool.map(source.example, indices)
        for index, example in zip(indices, examples, strict=True):
            yield source.keys[index], example


def _check_space(data_dir: pathlib.Path, splits: Mapping[str, Source]) -> None:
    needed = int(_SPACE_FACTOR * sum(source.num_bytes for source in splits.values()))
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise UsageError(
            f"--data_dir: {data_dir} has {free >> 20} MiB free, {needed >> 20} MiB are needed"
        )
