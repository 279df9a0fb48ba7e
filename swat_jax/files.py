"""Files that are whole at any moment, however a run ends."""

import errno
import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """The same as `replace_bytes`, of text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes beside the file, then renames: a reader sees the old one, if any, or the new one.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
