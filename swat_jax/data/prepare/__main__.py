r"""Turns an official archive into a standard TFDS directory.

Examples:
  python -m swat_jax.data.prepare cifar10
  python -m swat_jax.data.prepare cifar100 --archive cifar-100-binary.tar.gz
  python -m swat_jax.data.prepare imagenet2012 --archive FOLDER --data_dir DATA

  NAME              cifar10, cifar100 or imagenet2012
  --data_dir DATA   where TFDS directories are (~/tensorflow_datasets)
  --archive PATH    the official archive, without which CIFAR is downloaded; of
                    ImageNet the folder with both tar files, or the flag twice
  --no-verify       take an archive of another checksum or size

tfds.data_source(NAME, data_dir=DATA, download=False) reads what comes out.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from swat_jax import command_line
from swat_jax.data import prepare
from swat_jax.data.prepare import cifar, directory, download, imagenet
from swat_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("name", choices=prepare.DATASETS, metavar="NAME")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument("--archive", action="append", default=[])
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    return command_line.run(parser, _prepare, argv)


def _prepare(options: Any) -> command_line.Answer:
    path = run(
        options.name,
        pathlib.Path(options.data_dir).expanduser(),
        [pathlib.Path(path).expanduser() for path in options.archive],
        verify=options.verify,
    )
    text = f"{path}\ntrain with: --config.data.data_dir={options.data_dir}"
    return command_line.Answer({"path": str(path), "data_dir": options.data_dir}, text)


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


if __name__ == "__main__":
    sys.exit(main())
