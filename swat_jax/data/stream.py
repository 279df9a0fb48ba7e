"""Batches prepared ahead of time by Grain's threads."""

from collections.abc import Callable, Iterator

from swat_jax.data.interface import Batch

# Batches that may wait beside those in work.
_SPARE_BATCHES = 2


def stream(
    make_batch: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Iterator[Batch]:
    """Yields `make_batch(start)`, ..., `make_batch(stop - 1)` in this order.

    Threads, not processes: the decoder and numpy's copies release the interpreter lock, and
    nothing has to be pickled. Every batch is made by one thread.

    Args:
      make_batch: a pure function of the step.
      start: first step.
      stop: one past the last step.
      workers: threads; 0: every batch is made when it is asked for.
    """
    if not workers:
        yield from map(make_batch, range(start, stop))
        return
    import grain  # imported late: it takes a second

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + _SPARE_BATCHES)
    batches = grain.MapDataset.range(start, stop).map(make_batch)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
