"""Many files as a few of limited size, and back: for runs that move from machine to machine."""

from __future__ import annotations

import hashlib
import pathlib
import tarfile
import tempfile
from collections.abc import Mapping

MOST_BYTES = 16 * 2**20
_NAME = "part{:05d}.of{:05d}.{}"


def pack(
    files: Mapping[str, pathlib.Path], to: pathlib.Path, most_bytes: int = MOST_BYTES
) -> list[pathlib.Path]:
    """Writes files into parts of at most ``most_bytes``.

    Checkpoints hold floats that do not compress, so nothing is. Every part's name says how many
    there are and the hash of the whole.

    Args:
      files: their names in the parts, and where they are.
      to: folder for the parts; made where it is missing. Older parts in it are removed.
      most_bytes: of a part.

    Returns:
      The parts, in order.
    """
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=to) as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for name, path in files.items():
                tar.add(path, name)
        count = max(-(-whole.tell() // most_bytes), 1)
        whole.seek(0)
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:16]
        whole.seek(0)
        found = [to / _NAME.format(number + 1, count, digest) for number in range(count)]
        new = [path.with_name(f"new-{path.name}") for path in found]
        for path in new:
            path.write_bytes(whole.read(most_bytes))
    # The old ones stay until the new ones are whole.
    for old in to.glob("part*.of*"):
        old.unlink()
    for path, name in zip(new, found, strict=True):
        path.replace(name)
    return found


def unpack(parts: pathlib.Path, to: pathlib.Path) -> None:
    """Makes the files again of which `pack` made the parts, in a folder.

    Raises:
      SystemExit: parts are missing, damaged, or of more than one `pack`.
    """
    paths = sorted(parts.glob("part*.of*"))
    tails = {path.name.split(".", 1)[1] for path in paths}
    if len(tails) != 1:
        raise SystemExit(f"{parts} must hold the parts of one call, found those of {len(tails)}")
    count, digest = tails.pop().removeprefix("of").split(".")
    if len(paths) != int(count):
        raise SystemExit(f"{parts} holds {len(paths)} of {int(count)} parts")
    with tempfile.TemporaryFile() as whole:
        for path in paths:
            whole.write(path.read_bytes())
        whole.seek(0)
        if hashlib.file_digest(whole, "sha256").hexdigest()[:16] != digest:
            raise SystemExit(f"the parts in {parts} are damaged")
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(to, filter="data")
