"""The page on the paper's CIFAR-10 table beside what came out here.

Examples:
  python -m swat_jax.report docs/results
  python -m swat_jax.report docs/results --check
  python -m swat_jax.report my_results --output my_page.md

  RESULTS         folder of cifar10/*.json, which benchmarks/reproduce.py writes
  --output FILE   the page (docs/reproduction.md); pictures lie beside it
  --check         write nothing; exit code 1 where it is not up to date

The pictures need matplotlib: pip install swat-jax[report]
"""

from __future__ import annotations

import collections
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swat_jax import command_line, report_figures
from swat_jax.errors import UsageError
from swat_jax.report_figures import Run, Runs

# Top-1 in percent of CIFAR-10's rows, SWAT (NeurIPS 2020); None: nothing to compare with.
PAPER: dict[str, dict[str, float | None]] = {
    "resnet18": {
        "dense": None, "channel50": 94.73, "channel60": 94.68, "channel70": 94.65, "u90": None,
    },
    "vgg16": {"dense": None, "u90": 91.95, "erk95": 92.50, "m95": 93.41},
    "wrn16_8": {"dense": None, "u90": 95.13, "erk95": 95.00, "m95": 94.97},
    "densenet121": {
        "dense": None, "u90": 94.48, "erk90": 94.14, "m90": 94.29,
        "channel50": 95.04, "channel60": 94.82, "channel70": 94.81,
    },
}  # fmt: skip
# What the file of a run must hold.
KEYS = (
    *("network", "method", "seed", "label", "settings", "gpu_seconds", "pruned_test_accuracy"),
    *("weight_sparsity", "activation_sparsity", "training_flop_reduction", "device", "versions"),
    *("planned_training_flop_reduction", "dropped_activations", "steps", "config", "epochs"),
    "layers",
)
# How far below the paper's figure a row may be, in points.
TOLERANCE = 0.5
# The label of runs by a better recipe than the paper's: they have a column of their own.
IMPROVED = "improved"


def read(folder: Path) -> tuple[Runs, list[Run]]:
    """Runs of the table by (network, method), each of a seed, and those with a label.

    Raises:
      UsageError: a file that is not what `benchmarks/reproduce.py` writes.
    """
    rows: dict[tuple[str, str], list[Run]] = collections.defaultdict(list)
    others: list[Run] = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            missing = [key for key in KEYS if key not in run]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is not the JSON file of a run: {error!r}") from error
        if missing:
            raise UsageError(f"{path} is not the JSON file of a run: no {', '.join(missing)}")
        key = (run["network"], run["method"])
        others.append(run) if run["label"] else rows[key].append(run)
    return rows, others


def accuracy(runs: Sequence[Run]) -> tuple[float, str]:
    """The pruned top-1 in percent: its mean over seeds, and how it is printed."""
    mean = report_figures.mean_accuracy(runs)
    if len(runs) == 1:
        return mean, f"{mean:.2f}"
    deviation = statistics.stdev(100 * run["pruned_test_accuracy"] for run in runs)
    return mean, f"{mean:.2f} +- {deviation:.2f}"


def table(rows: Runs, improved: Runs) -> list[str]:
    """Every row of the paper's table beside what came out."""
    heads = (
        *("network", "method", "paper", "here", "difference", IMPROVED, "zeros in weights"),
        *("in saved activations", "FLOPs saved", "GPU seconds", "seeds"),
    )
    lines = [line(heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    for network, methods in PAPER.items():
        for method, paper in methods.items():
            told = "" if paper is None else f"{paper:.2f}"
            runs = rows.get((network, method), ())
            better = improved.get((network, method), ())
            beside = accuracy(better)[1] if better else ""
            if not runs:
                cells = [network, method, told, "not run", "", beside]
                lines.append(line([*cells, *[""] * (len(heads) - len(cells))]))
                continue
            mean, here = accuracy(runs)
            cells = [network, method, told, here]
            cells.append("" if paper is None else f"{mean - paper:+.2f}{verdict(mean, paper)}")
            cells.append(beside)
            for key in ("weight_sparsity", "activation_sparsity"):
                cells.append(f"{100 * statistics.fmean(run[key] for run in runs):.1f} %")
            cells.append(f"{report_figures.flops_saved(runs):.1f} %")
            seconds = [run["gpu_seconds"] for run in runs if run["gpu_seconds"] is not None]
            cells.append(f"{statistics.fmean(seconds):.0f}" if seconds else "")
            lines.append(line([*cells, str(len(runs))]))
    return lines


def verdict(mean: float, paper: float) -> str:
    """What stands beside a difference, as it is printed."""
    return "" if round(mean - paper, 2) >= -TOLERANCE else " (missed)"


def others_table(rows: Runs, others: Sequence[Run]) -> list[str]:
    """Runs with other settings than their row's, those by the improved recipe among them."""
    lines = [line(("network", "method", "what differs", "top-1", "the row's")), "|---" * 5 + "|"]
    groups: dict[tuple[str, str, str], list[Run]] = collections.defaultdict(list)
    for run in others:
        settings = ", ".join(f"`{setting}`" for setting in run["settings"])
        groups[run["network"], run["method"], settings].append(run)
    for key, runs in sorted(groups.items(), key=lambda group: natural(group[0])):
        row = rows.get(key[:2], ())
        lines.append(line((*key, accuracy(runs)[1], accuracy(row)[1] if row else "")))
    return lines


def natural(texts: Sequence[str]) -> list[list[str | int]]:
    """A key that sorts the numbers in texts as numbers."""
    return [
        [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", text)]
        for text in texts
    ]


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def flagged(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """XLA's flags that runs were given, each with the rows that had them."""
    rows: dict[str, dict[str, None]] = {}
    for run in runs:
        if flags := run.get("xla_flags"):
            rows.setdefault(flags, {})[f"{run['network']} {run['method']}"] = None
    return [(flags, list(names)) for flags, names in sorted(rows.items())]


def page(rows: Runs, others: Sequence[Run], pictures: Mapping[str, str]) -> str:
    """The page in Markdown.

    Args:
      rows: by (network, method).
      others: runs with other settings.
      pictures: title -> file, from where the page lies.
    """
    every = [run for runs in rows.values() for run in runs]
    # A note may say several things, and files mostly say the same.
    notes = sorted({one for run in every if "note" in run for one in run["note"].split("; ")})
    lines = [
        "# The paper's CIFAR-10 table, reproduced",
        "",
        "Made by `python -m swat_jax.report docs/results` from `docs/results/cifar10`.",
        "",
        "Top-1 in percent after hard pruning: of the last checkpoint here, in the paper of the one",
        f"that was best on the test set. A row is missed where it is more than {TOLERANCE} points",
        "below the paper's. The recipes are the paper's, in `configs/`, in the precision that is",
        "named below. FLOPs are by the paper's convention, of the sparsity that was asked for; of",
        "SWAT-M, where budgets move, as measured. GPU seconds are all the time that a run took,",
        "from its start to its end; of a GPU that several ran on at once, each has an equal part.",
        *(f"Files say of themselves: {note}." for note in notes),
        *(f"With `XLA_FLAGS={flags}`: {', '.join(names)}." for flags, names in flagged(every)),
    ]
    if every:
        devices = sorted({run["device"] for run in every})
        versions = sorted({run["versions"]["jax"] for run in every})
        precisions = sorted({run["config"]["precision"] for run in every})
        dropped = [run["dropped_activations"] for run in every]
        known = [number for number in dropped if number is not None]
        told = f"at most {math.ceil(max(known))} of a batch" if known else "not known of any run"
        if known and len(known) < len(dropped):
            told += f"; runs of which it is not known: {len(dropped) - len(known)}"
        where = ", ".join([*devices, f"jax {', '.join(versions)}", *precisions])
        lines += [
            f"{len(every)} runs, on {where}.",
            f"Values to be saved that found no room: {told}.",
        ]
    else:
        lines += ["No row has been run at full length yet."]
    improved = collections.defaultdict(list)
    for run in others:
        if run["label"] == IMPROVED:
            improved[run["network"], run["method"]].append(run)
    lines += ["", *table(rows, improved)]
    lines += [
        "",
        "CIFAR-100 and ImageNet were not run. For unstructured CIFAR-100 there are no figures to",
        "compare with: the published list repeats CIFAR-10's there.",
    ]
    if others:
        lines += ["", "## With other settings", "", *others_table(rows, others)]
    for title, file in pictures.items():
        lines += ["", f"## {title}", "", f"![{title}]({file})"]
    return "\n".join([*lines, ""])


def write(results: Path, output: Path, *, check: bool = False) -> list[Path]:
    """Writes the page, and the pictures in a folder of its name.

    Args:
      results: the folder that holds ``cifar10``.
      output: the page.
      check: write nothing.

    Returns:
      The files that were, or are, not up to date.
    """
    folder = results / "cifar10"
    if not results.is_dir():
        raise UsageError(f"{results} is no folder")
    rows, others = read(folder)
    drawn = report_figures.draw(rows, PAPER) if rows else {}
    place = output.with_suffix("")
    files: dict[Path, str] = {}
    pictures: dict[str, str] = {}
    for name, (title, svg) in drawn.items():
        files[place / f"{name}.svg"] = svg
        pictures[title] = f"{place.name}/{name}.svg"
    files[output] = page(rows, others, pictures)
    stale = [
        path
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in () if check else stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    return stale


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--output", type=Path, default=Path("docs/reproduction.md"))
    parser.add_argument("--check", action="store_true")
    return command_line.run(parser, _write, argv)


def _write(options: Any) -> command_line.Answer:
    stale = [str(path) for path in write(options.results, options.output, check=options.check)]
    key, told = ("stale", "not up to date") if options.check else ("written", "written")
    code = command_line.FAILED if options.check and stale else command_line.DONE
    return command_line.Answer({key: stale}, "\n".join(f"{path}: {told}" for path in stale), code)


if __name__ == "__main__":
    sys.exit(main())
