"""The tables of docs/sparse_convolutions.md, from the figures in docs/results.

python benchmarks/sparse_conv_page.py            # writes them into the page
python benchmarks/sparse_conv_page.py --check    # only says whether the page is up to date
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import marked
import results

PAGE = results.ROOT / "docs/sparse_convolutions.md"
BEGIN = "<!-- benchmarks/sparse_conv_page.py writes {} -->\n"
SPARSITIES = (70, 80, 90)


def measured(found: Mapping[str, Any], what: str) -> str:
    """On what, and how fast that is."""
    return (
        f"{found['device'].removeprefix('NVIDIA ')}, jax {found['versions']['jax']}, "
        f"{found['date']}; milliseconds; copies at {found['copy_gb_per_s'] / 1e3:.1f} TB/s, {what}"
    )


def ratio(row: Mapping[str, Any], slow: str, mark: float | None = None) -> str:
    """How many times as fast as that the kernel is, in bold where it reaches its mark."""
    found = row[f"{slow}_ms"] / row["sparse_ms"]
    return f"**{found:.2f}**" if mark is not None and found >= mark else f"{found:.2f}"


def weight_gradient() -> list[str]:
    """From packed activations; its mark is to be 1.3 times as fast as from dense ones."""
    found = results.read("sparse_conv_weight_gradient_h200")
    before = {
        (row["name"], row["sparsity"]): f"{row['sparse_ms']:.3f}"
        for row in results.read("sparse_conv_mma_h200")["convs"]
    }
    products = f"large products at {found['product_tflop_per_s']:.0f} TFLOP/s."
    lines = [
        measured(found, products),
        "",
        results.line_of(
            *("conv", "zeros", "dense", "unpack", "before", "here", "nothing kept", "floor"),
            *("dense : here", "unpack : here"),
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["convs"]:
        dense, unpack, *others = (
            f"{row[f'{name}_ms']:.3f}" for name in ("dense", "unpack", "sparse", "nothing", "floor")
        )
        old = before.get((row["name"], row["sparsity"]), "")
        cells = (
            *(row["name"], f"{row['sparsity']:.0%}", dense, unpack, old, *others),
            *(ratio(row, "dense", 1.3), ratio(row, "unpack")),
        )
        lines.append(results.line_of(*cells))
    return lines


def tuned() -> list[str]:
    """What `swat_jax.tune` found for the weight gradients of a ResNet-50's first two stages."""
    found = results.read("sparse_conv_tuned_h200")
    lines = [
        f"{found['device'].removeprefix('NVIDIA ')}, {found['made_with']['date']}; milliseconds.",
        "",
        "| input, kernel | unpack and cuDNN | here | tile / splits | gain |",
        "|---|---:|---:|---|---:|",
    ]
    for name, ops in found["layers"].items():
        times = ops["weight_gradient"]
        plain, here = (times["milliseconds"][one] for one in ("dense", times["chosen"]))
        cells = (
            name.partition(",")[0].removeprefix("conv "),
            *(f"{plain:.3f}", f"{here:.3f}", times["chosen"].partition(":")[2]),
            f"{plain / here:.2f}",
        )
        lines.append(results.line_of(*cells))
    return lines


def forward() -> list[str]:
    """Of single weights in true float32; the marks are twice cuDNN's rate, four times at 97 %."""
    found = results.read("sparse_conv_forward_h200")
    lines = [
        measured(found, "batch 512, forward, lists included."),
        "",
        "| conv | zeros | cuDNN | cuDNN, TF32 | lists | here | floor | cuDNN : here |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["convs"]:
        mark = 4 if row["sparsity"] >= 0.97 else 2
        times = (row[f"{name}_ms"] for name in ("dense", "tf32", "compact", "sparse", "floor"))
        cells = (row["name"], f"{row['sparsity']:.0%}", *(f"{ms:.2f}" for ms in times))
        lines.append(results.line_of(*cells, ratio(row, "dense", mark)))
    return lines


def vector_times() -> list[str]:
    """Of vectors in bfloat16; the mark is to be 1.4 times as fast as dense."""
    found = results.read("sparse_conv_vector_h200")
    lines = [
        measured(found, "batch 512, forward, lists included."),
        "",
        "| conv | V | zeros | cuDNN | here | floor | TFLOP/s of what is kept | cuDNN : here |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["convs"]:
        times = (row[f"{name}_ms"] for name in ("dense", "sparse", "floor"))
        cells = (
            *(row["name"], row["vector"], f"{row['sparsity']:.0%}"),
            *(f"{ms:.3f}" for ms in times),
            f"{row['operations'] / row['sparse_ms'] / 1e9:.0f}",
        )
        lines.append(results.line_of(*cells, ratio(row, "dense", 1.4)))
    return lines


def vectors() -> list[str]:
    """Accuracy by granularity and sparsity, and how far it lies from that of single weights."""
    files = sorted((results.RESULTS / "vectors").glob("*.json"))
    runs = {run["method"]: run for run in (results.read(f"vectors/{f.stem}") for f in files)}
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


TABLES = (weight_gradient, tuned, forward, vector_times, vectors)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tables of docs/sparse_convolutions.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    tables = {BEGIN.format(table.__name__): table() for table in TABLES}
    stale = f"{PAGE.name} differs from docs/results: run python benchmarks/sparse_conv_page.py"
    return marked.update(PAGE, tables, check=options.check, stale=stale)


if __name__ == "__main__":
    sys.exit(main())
