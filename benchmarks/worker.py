"""Processes that work only when they are asked to: lines go in, lines of JSON come out."""

from __future__ import annotations

import contextlib
import json
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any


def answer(found: Mapping[str, Any]) -> None:
    """One line for the parent."""
    print(json.dumps(found), flush=True)


class Worker:
    """A process that is asked by lines, and answers each with one line of JSON.

    Args:
      name: what it is called where it fails.
      command: what it runs.
      environment: all of its environment.
      log: file for what it prints to its standard error.
      timeout: seconds that an answer may take.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: pathlib.Path,
        timeout: float,
    ) -> None:
        self.name, self.timeout, self.error = name, timeout, ""
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stream, text=True,
            )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def ask(self, line: str) -> None:
        """Lets it work; a process that is gone shows when there is no answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def answer(self, turns: int = 1) -> dict[str, Any]:
        """The next line that is an answer; else nothing, and `error` says why there is none.

        Args:
          turns: how many processes may have to work one after the other until it comes.
        """
        timeout = turns * self.timeout
        try:
            while line := self._lines.get(timeout=timeout):
                with contextlib.suppress(json.JSONDecodeError):
                    if isinstance(found := json.loads(line), dict):
                        return found
            code = self._process.wait(timeout=20)
            errors = [line for line in self.printed() if "Error" in line]
            self.error = [f"exit code {code}", *errors][-1][:500]
        except queue.Empty:
            self.error = f"no answer in {timeout} s"
            self.close()
        except subprocess.TimeoutExpired:
            self.error = "it says nothing more, and does not end"
            self.close()
        print(f"{self.name}: {self.error}", file=sys.stderr)
        return {}

    def printed(self) -> list[str]:
        """What it said on its standard error until now, line by line."""
        return self._log.read_text(errors="replace").strip().splitlines()

    def close(self) -> None:
        """Ends the process, which gives its memory back."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20 if not self.error else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=20)
