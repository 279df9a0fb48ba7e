"""The JSON file of a run over many convs: written after every round, and gone on with later."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from convs import Problem

# What was measured otherwise in one of these is another file.
SAME = ("device", "backend", "library", "versions", "op", "dtype", "settings")
ROWS = ("convs", "failed", "refused", "rounds")


def begin(path: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a new file, or of the one that is there, to be gone on with.

    Rates that floors are computed with stay what they were in the file.

    Args:
      path: of the file, if there is to be one.
      facts: on what is measured, and how.
    """
    if path is None or not pathlib.Path(path).exists():
        return {**facts, **{rows: [] for rows in ROWS}}
    found = json.loads(pathlib.Path(path).read_text())
    for key in SAME:
        if found.get(key) != facts[key]:
            sys.exit(
                f"{path}: {key} is {found.get(key)} there, and {facts[key]} here; "
                "give another --output"
            )
    return found


def of_problems(
    rows: Sequence[Mapping[str, Any]], problems: Sequence[Problem]
) -> list[Mapping[str, Any]]:
    """Rows in the order of problems; those of others come last."""
    places = {problem: place for place, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: places.get(Problem.of(row), len(places)))
