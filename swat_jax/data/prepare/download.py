"""Official archives: where they are, what they must contain byte for byte, how to fetch them."""

import dataclasses
import hashlib
import pathlib
import sys
import time
import urllib.error
import urllib.request

from swat_jax.errors import RunError, UsageError

_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60
_SECONDS_BETWEEN_LINES = 5


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
      url: where it is published.
      sha256: checksum, in hexadecimal digits.
      num_bytes: its size.
    """

    url: str
    sha256: str
    num_bytes: int

    @property
    def file_name(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def verify(path: pathlib.Path, archive: Archive) -> None:
    """Compares a file with the published checksum.

    Args:
      path: the file.
      archive: what it should be.

    Raises:
      UsageError: it is something else.
    """
    size = path.stat().st_size
    if size != archive.num_bytes:
        raise UsageError(
            f"--archive: {path} has {size} bytes, {archive.file_name} has {archive.num_bytes}: the "
            "download may have been cut short; fetch it again, or give --no-verify"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise UsageError(
            f"--archive: sha256 of {path} is {found}, of {archive.file_name} {archive.sha256}; "
            "fetch it again, or give --no-verify"
        )


def fetch(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
    """Downloads an archive, unless it is there already, and verifies it.

    Args:
      archive: what to fetch.
      folder: where to keep it.

    Returns:
      The file.

    Raises:
      RunError: the network or the disk failed, or what came is not the archive.
    """
    path = folder / archive.file_name
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(archive, partial)
        except (urllib.error.URLError, OSError) as error:
            partial.unlink(missing_ok=True)
            reason = getattr(error, "reason", None) or error
            raise RunError(
                f"cannot download {archive.url} to {folder}: {reason}; fetch it yourself and give "
                "--archive PATH"
            ) from error
        partial.rename(path)
    try:
        verify(path, archive)
    except UsageError as error:
        path.unlink()
        raise RunError(f"{archive.url}: {error}; the file was removed") from error
    return path


def _download(archive: Archive, path: pathlib.Path) -> None:
    """Copies an address to a file, with a line about it now and then."""
    print(f"downloading {archive.url}", file=sys.stderr)
    done, last = 0, time.monotonic()
    with (
        urllib.request.urlopen(archive.url, timeout=_TIMEOUT_SECONDS) as source,
        path.open("wb") as target,
    ):
        while block := source.read(_BLOCK):
            target.write(block)
            done += len(block)
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"  {done >> 20} of {archive.num_bytes >> 20} MiB", file=sys.stderr)
