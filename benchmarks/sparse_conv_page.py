"""The tables of docs/sparse_convolutions.md, from the figures in docs/results.

python benchmarks/sparse_conv_page.py            # writes them into the page
python benchmarks/sparse_conv_page.py --check    # only says whether the page is up to date
"""

import argparse
import json
import sys

import marked
import results

PAGE = results.ROOT / "docs/sparse_convolutions.md"
BEGIN = "<!-- benchmarks/sparse_conv_page.py writes {} -->\n"
SPARSITIES = (70, 80, 90)


def vectors() -> list[str]:
    """Accuracy by granularity and sparsity, and how far it lies from that of single weights."""
    files = sorted((results.RESULTS / "vectors").glob("*.json"))
    runs = {run["method"]: run for run in (json.loads(file.read_text()) for file in files)}
    found = {method: 100 * run["pruned_test_accuracy"] for method, run in runs.items()}
    epochs = {run["config"]["epochs"] for run in runs.values()}
    devices = {run["device"].split(" x ")[1] for run in runs.values()}
    lines = [
        (
            f"ResNet-18, {' or '.join(map(str, epochs))} epochs of a rising and falling rate, one "
            f"seed, {' and '.join(devices)}; dense: {found['dense']:.2f}."
        ),
        "",
        "| zeros | single weights | `vector8` | `vector16` | `vector32` |",
        "|---:|---:|---:|---:|---:|",
    ]
    for zeros in SPARSITIES:
        single = found[f"u{zeros}"]
        cells = [f"{zeros} %", f"{single:.2f}"]
        for length in (8, 16, 32):
            here = found[f"vector{length}-{zeros}"]
            cells.append(f"{here:.2f} ({here - single:+.2f})")
        lines.append(results.line_of(*cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables of docs/sparse_convolutions.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    tables = {BEGIN.format(table.__name__): table() for table in (vectors,)}
    stale = f"{PAGE.name} differs from docs/results: run python benchmarks/sparse_conv_page.py"
    return marked.update(PAGE, tables, check=options.check, stale=stale)


if __name__ == "__main__":
    sys.exit(main())
