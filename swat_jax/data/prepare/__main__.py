"""Turns an official archive into a standard TFDS directory.

    python -m swat_jax.data.prepare cifar10
    python -m swat_jax.data.prepare imagenet2012 --archive FOLDER_WITH_BOTH_TAR_FILES

The result is what `tfds.data_source(NAME, data_dir=..., download=False)` reads, in array_record
files. TensorFlow is not needed.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from swat_jax.data import prepare
from swat_jax.data.prepare import cifar, directory, download, imagenet
from swat_jax.errors import RunError, UsageError

DEFAULT_DATA_DIR = "~/tensorflow_datasets"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (it failed) or 2 (wrong use).

    Args:
      argv: arguments; None: those of the process.
    """
    flags = _parser().parse_args(argv)
    try:
        path = run(
            flags.name,
            pathlib.Path(flags.data_dir).expanduser(),
            [pathlib.Path(path).expanduser() for path in flags.archive],
            verify=flags.verify,
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}\ntrain with: --config.data.data_dir={flags.data_dir}")
    return 0


def run(
    name: str, data_dir: pathlib.Path, archives: Sequence[pathlib.Path], *, verify: bool = True
) -> pathlib.Path:
    """Prepares a data set, unless it is prepared already.

    Args:
      name: one of `prepare.DATASETS`.
      data_dir: where TFDS directories are.
      archives: archives that are here; empty: CIFAR's is downloaded.
      verify: check the archive's checksum (CIFAR) and the number of images.

    Returns:
      The directory of the set.

    Raises:
      UsageError: an archive is missing, or it is not the official one.
      RunError: the network or the disk failed.
    """
    for path in archives:
        if not path.exists():
            raise UsageError(f"--archive: nothing at {str(path)!r}")
    ready = directory.existing(name, data_dir)
    if ready is not None:
        print(f"{ready} is there already; remove it to prepare the set again", file=sys.stderr)
        return ready
    if name not in cifar.LAYOUTS:
        return imagenet.prepare(data_dir, archives, complete=verify)
    if len(archives) > 1:
        raise UsageError(f"--archive: {name} takes one archive, got {len(archives)}")
    official = cifar.LAYOUTS[name].archive
    if not archives:
        archive = download.fetch(official, data_dir / "downloads")
    else:
        archive = archives[0]
        if verify:
            download.verify(archive, official)
    return cifar.prepare(name, data_dir, archive, complete=verify)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swat_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=prepare.DATASETS, help="TFDS name of the data set")
    parser.add_argument(
        "--data_dir", default=DEFAULT_DATA_DIR, help="where TFDS directories are (%(default)s)"
    )
    parser.add_argument(
        "--archive",
        action="append",
        default=[],
        metavar="PATH",
        help="the official archive; without it CIFAR is downloaded. ImageNet: the folder with both "
        "tar files, or the flag twice",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="take an archive of another checksum or size",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
