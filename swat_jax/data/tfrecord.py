"""Random access to TFRecord files without TensorFlow.

A record is: length (uint64, little endian), checksum of the length (4 bytes), the data, checksum of
the data (4 bytes). One pass over the lengths gives an index; the data are then read at will.
"""

import concurrent.futures
import os
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swat_jax.errors import UsageError

_LENGTH = struct.Struct("<Q")
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_INDEX_THREADS = 16


class TfRecordFiles:
    """The records of some files, in order.

    Args:
      paths: the files.
      counts: records in each, as the data set's own metadata say.

    Raises:
      UsageError: a file is missing or damaged.
    """

    def __init__(self, paths: Sequence[pathlib.Path], counts: Sequence[int]) -> None:
        self._paths = [os.fspath(path) for path in paths]
        with concurrent.futures.ThreadPoolExecutor(_INDEX_THREADS) as pool:
            spans = list(pool.map(index_file, self._paths))
        for path, span, count in zip(self._paths, spans, counts, strict=True):
            if len(span) != count:
                raise UsageError(f"{path}: must hold {count} records, holds {len(span)}")
        self._spans = np.concatenate(spans) if spans else np.empty((0, 2), np.int64)
        self._first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        start, length = self._spans[index].tolist()
        # Opened anew each time: a thousand shards would use up the open files of a process.
        with open(self._paths[file], "rb", buffering=0) as opened:
            return os.pread(opened.fileno(), length, start)


def index_file(path: str) -> NDArray[np.int64]:
    """Finds the records of a file.

    Args:
      path: a TFRecord file.

    Returns:
      int64 (N, 2): where the data of each record start, and their length, in bytes.

    Raises:
      UsageError: the file is missing, or its lengths do not add up.
    """
    spans = []
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            position = 0
            while position < size:
                file.seek(position)
                header = file.read(_HEADER_BYTES)
                length = _LENGTH.unpack_from(header)[0] if len(header) == _HEADER_BYTES else size
                start = position + _HEADER_BYTES
                position = start + length + _FOOTER_BYTES
                if position > size:
                    raise UsageError(
                        f"{path}: damaged or cut short at record {len(spans)}; copy it again"
                    )
                spans.append((start, length))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    return np.asarray(spans, np.int64).reshape(-1, 2)
