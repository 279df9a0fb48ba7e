"""Measurements that several processes compile for at once, and make one after the other.

In a round every process compiles for a task of its own. When all have done so, or failed, they
measure one after the other, alone on the machine: no process compiles meanwhile, which would take
the GPU too. Then the next round begins. A process that ends or does not answer is the failure of
its task alone; the next round has another one in its place.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from worker import Worker, answer

# Compiles for a task, which can be written as JSON; what it returns measures. It keeps nothing
# large on the device, and neither does what it returns when it has not been called yet.
Prepare = Callable[[Mapping[str, Any]], Callable[[], Any]]


class Team(Protocol):
    """Whoever does the tasks of a round.

    Attributes:
      jobs: how many tasks a round may have.
    """

    jobs: int

    def round(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """For each task `found`, and when it was `compiling` and `measuring` (from, to).

        The times are of a clock that all processes of a machine share. For what failed there are
        `error` and `stderr`, its last lines, instead.
        """
        ...


class Here:
    """This process, with one task at a time; what fails is raised."""

    jobs = 1

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare

    def round(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        (task,) = tasks
        compiling, measure = _timed(lambda: self._prepare(task))
        measuring, found = _timed(measure)
        return [{"found": found, "compiling": compiling, "measuring": measuring}]


class Processes:
    """Processes that `serve`, started when they are needed.

    Args:
      start: makes one, given which it is.
      jobs: how many there are.
    """

    def __init__(self, start: Callable[[int], Worker], jobs: int) -> None:
        self.jobs = jobs
        self._start = start
        self._workers: dict[int, Worker] = {}

    def round(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        for number in range(len(tasks)):
            if number not in self._workers:
                self._workers[number] = self._start(number)
        workers = [self._workers[number] for number in range(len(tasks))]
        for worker, task in zip(workers, tasks, strict=True):
            worker.ask(json.dumps(task))
        # Each may have to wait until all others have tried algorithms.
        answers = [worker.answer(turns=len(workers)) for worker in workers]
        for number, worker in enumerate(workers):
            if not worker.error:
                worker.ask("measure")
                answers[number] |= worker.answer()
            if worker.error:
                answers[number] = {"error": worker.error, "stderr": worker.printed()[-10:]}
                self._workers.pop(number).close()
        return answers

    def close(self) -> None:
        """Ends all of them."""
        for worker in self._workers.values():
            worker.close()


def serve(prepare: Prepare) -> None:
    """What a process does: a line of its input is a task, and the next one lets it measure."""
    for line in iter(sys.stdin.readline, ""):
        compiling, measure = _timed(lambda line=line: prepare(json.loads(line)))
        answer({"compiling": compiling})
        if not sys.stdin.readline():
            return
        measuring, found = _timed(measure)
        del measure  # its programs
        answer({"found": found, "measuring": measuring})


def _timed(call: Callable[[], Any]) -> tuple[list[float], Any]:
    start = time.monotonic()
    found = call()
    return [start, time.monotonic()], found
