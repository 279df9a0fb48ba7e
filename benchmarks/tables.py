r"""The table of short runs in README.md, from the figures in docs/results.

    python benchmarks/tables.py            # writes it into README.md
    python benchmarks/tables.py --check    # only says whether README.md is up to date

One row for each method. "a / b": with the data on the device / prepared on the host; "-": not run.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks/tables.py writes this -->\n", "<!-- until here -->\n"
NAMES = {
    "dense": "dense",
    "u90": "SWAT-U 90",
    "erk90": "SWAT-ERK 90",
    "m90": "SWAT-M 90",
    "channel70": "channel 70",
}


def runs(name: str) -> dict[tuple[str, str], dict]:
    """(method, path) -> the figures of one run."""
    found = json.loads((ROOT / "docs" / "results" / f"short_runs_{name}.json").read_text())
    return {(run["method"], run["path"]): run for run in found["runs"]}


def short_runs() -> str:
    """Loss ratios and accuracies on both machines, and the speed of the one that was not shared."""
    cpu, gpu = runs("cpu"), runs("h200")
    lines = [
        "| method | CPU: ratio | pruned accuracy | H200: ratio | pruned accuracy | images/s |",
        "|---|---|---|---|---|---|",
    ]

    def pair(found: dict, method: str, key: str, form: str) -> str:
        both = [found.get((method, path)) for path in ("device", "grain")]
        return " / ".join(form.format(run[key]) if run else "-" for run in both)

    for method, name in NAMES.items():
        cells = [
            pair(cpu, method, "ratio", "{:.3f}"),
            pair(cpu, method, "pruned_test_accuracy", "{:.1%}"),
            pair(gpu, method, "ratio", "{:.3f}"),
            pair(gpu, method, "pruned_test_accuracy", "{:.1%}"),
            pair(gpu, method, "images_per_second", "{:,.0f}"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="The table of short runs in README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n{short_runs()}\n{END}{rest.split(END)[1]}"
    if new == text:
        return 0
    if options.check:
        print("README.md differs from docs/results: run python benchmarks/tables.py")
        return 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
