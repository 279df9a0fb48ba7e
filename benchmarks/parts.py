"""Many files as a few of limited size, and back: for runs that move from machine to machine."""

from __future__ import annotations

import hashlib
import io
import pathlib
import tarfile
from collections.abc import Mapping

MOST_BYTES = 16 * 2**20
_NAME = "part{:03d}.of{:03d}.{}"


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
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in files.items():
            tar.add(path, name)
    whole = buffer.getvalue()
    digest = hashlib.sha256(whole).hexdigest()[:16]
    to.mkdir(parents=True, exist_ok=True)
    for old in to.glob("part*.of*"):
        old.unlink()
    pieces = [whole[at : at + most_bytes] for at in range(0, len(whole), most_bytes)]
    found = []
    for number, piece in enumerate(pieces, start=1):
        path = to / _NAME.format(number, len(pieces), digest)
        path.write_bytes(piece)
        found.append(path)
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
    whole = b"".join(path.read_bytes() for path in paths)
    if hashlib.sha256(whole).hexdigest()[:16] != digest:
        raise SystemExit(f"the parts in {parts} are damaged")
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        tar.extractall(to, filter="data")
