"""The tables in README.md, from the figures in docs/results.

    python benchmarks/tables.py            # writes them into README.md
    python benchmarks/tables.py --check    # only says whether README.md is up to date

One of training steps, one of the paper's rows.
"""

import argparse
import pathlib
import sys

import marked
import results
import step_tables

from swat_jax import report, report_figures

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- benchmarks/tables.py writes {} -->\n"
NETWORKS = {name.removeprefix("cifar10_"): told for name, told in results.NAMES.items()}


def steps() -> list[str]:
    """What a step of u90 takes of a dense one."""
    lines = [
        "| network, batch | time | exact at every step | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for (network, batch), found in step_tables.shares(results.read("steps_h200")["steps"]).items():
        name = f"{results.NAMES[network]}, {batch}"
        lines.append(results.line_of(name, *(f"{share:.2f}" for share in found)))
    return lines


def cifar10() -> list[str]:
    """The rows of the paper's table that were run, beside it."""
    rows, _ = report.read(results.RESULTS / "cifar10")
    lines = [
        "| network | method | the paper's | here | FLOPs saved |",
        "|---|---|---:|---:|---:|",
    ]
    for network, methods in report.PAPER.items():
        for method, paper in methods.items():
            if runs := rows.get((network, method), ()):
                saved = report_figures.flops_saved(runs)
                told = "" if paper is None else f"{paper:.2f}"
                _, here = report.accuracy(runs)
                cells = (NETWORKS[network], f"`{method}`", told, here, f"{saved:.0f} %")
                lines.append(results.line_of(*cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables in README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    tables = {BEGIN.format(table.__name__): table() for table in (steps, cifar10)}
    stale = "README.md differs from docs/results: run python benchmarks/tables.py"
    return marked.update(README, tables, check=options.check, stale=stale)


if __name__ == "__main__":
    sys.exit(main())
