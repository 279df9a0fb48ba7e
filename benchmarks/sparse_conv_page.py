"""The tables of docs/sparse_convolutions.md, from the figures in docs/results.

python benchmarks/sparse_conv_page.py            # writes them into the page
python benchmarks/sparse_conv_page.py --check    # only says whether the page is up to date

Where there are sweeps over all convs, docs/sparse_convolutions_sweep.md is written with all of
their tables, and their summary into the page. Where there are none, neither is there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import marked
import results
import sparse_conv_sweep_page

PAGE = results.ROOT / "docs/sparse_convolutions.md"
SWEEP = PAGE.with_name(sparse_conv_sweep_page.PAGE)
BEGIN = "<!-- benchmarks/sparse_conv_page.py writes {} -->\n"
SPARSITIES = (70, 80, 90)
SINGLE_WEIGHTS = ("forward", "input_gradient", "forward_resnet50")


def timings(
    found: Mapping[str, Any],
    what: str,
    columns: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Sequence[Any]],
) -> list[str]:
    """A line for each conv, below on what it was measured, and how fast that is."""
    return [
        (
            f"{found['device'].removeprefix('NVIDIA ')}, jax {found['versions']['jax']}, "
            f"{found['date']}; milliseconds; copies at {found['copy_gb_per_s'] / 1e3:.1f} TB/s, "
            f"{what}"
        ),
        "",
        results.line_of(*columns),
        f"|---|{'---:|' * (len(columns) - 1)}",
        *(results.line_of(*cells(row)) for row in found["convs"]),
    ]


def formatted(row: Mapping[str, Any], names: Sequence[str], digits: int = 3) -> list[str]:
    """Times of a conv by their names."""
    return [f"{row[f'{name}_ms']:.{digits}f}" for name in names]


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

    def cells(row: Mapping[str, Any]) -> Sequence[Any]:
        old = before.get((row["name"], row["sparsity"]), "")
        return (
            *(row["name"], f"{row['sparsity']:.0%}", *formatted(row, ("dense", "unpack")), old),
            *formatted(row, ("sparse", "nothing", "floor")),
            *(ratio(row, "dense", 1.3), ratio(row, "unpack")),
        )

    columns = (
        *("conv", "zeros", "dense", "unpack", "before", "here", "nothing kept", "floor"),
        *("dense : here", "unpack : here"),
    )
    what = f"large products at {found['product_tflop_per_s']:.0f} TFLOP/s."
    return timings(found, what, columns, cells)


def tuned() -> list[str]:
    """Of the table that comes with the package: weight gradients, timed by `swat_jax.tune`."""
    found = json.loads((results.ROOT / "swat_jax/tables/nvidia_h200.json").read_text())
    lines = [
        f"{found['device'].removeprefix('NVIDIA ')}, {found['made_with']['date']}; milliseconds.",
        "",
        "| input, kernel | unpack and cuDNN | here | tile / splits | gain |",
        "|---|---:|---:|---|---:|",
    ]
    for name, ops in found["layers"].items():
        times = dict(ops["weight_gradient"]["milliseconds"])
        plain = times.pop("dense")
        best = min(times, key=times.__getitem__)
        gain = f"{plain / times[best]:.2f}"
        is_chosen = ops["weight_gradient"]["chosen"] == best
        cells = (
            name.partition(",")[0].removeprefix("conv "),
            *(f"{plain:.3f}", f"{times[best]:.3f}", best.partition(":")[2]),
            f"**{gain}**" if is_chosen else gain,
        )
        lines.append(results.line_of(*cells))
    return lines


def single_weights() -> list[str]:
    """In true float32; the marks are twice cuDNN's rate, four times at 97 %."""

    def cells(row: Mapping[str, Any]) -> Sequence[Any]:
        times = formatted(row, ("dense", "tf32", "compact", "sparse", "floor"), digits=2)
        mark = 4 if row["sparsity"] >= 0.97 else 2
        product = row["op"].replace("_", " ")
        start = (product, row["batch"], row["name"], f"{row['sparsity']:.0%}")
        return *start, *times, ratio(row, "dense", mark)

    files = [results.read(f"sparse_conv_{name}_h200") for name in SINGLE_WEIGHTS]
    found = {**files[0], "convs": [row for file in files for row in file["convs"]]}
    columns = (
        *("product", "images", "conv", "zeros", "cuDNN", "cuDNN, TF32", "lists", "here", "floor"),
        "cuDNN : here",
    )
    return timings(found, "lists included.", columns, cells)


def vector_times() -> list[str]:
    """Of vectors in bfloat16; the mark is to be 1.4 times as fast as dense."""

    def cells(row: Mapping[str, Any]) -> Sequence[Any]:
        return (
            *(row["name"], row["vector"], f"{row['sparsity']:.0%}"),
            *formatted(row, ("dense", "sparse", "floor")),
            f"{row['operations'] / row['sparse_ms'] / 1e9:.0f}",
            ratio(row, "dense", 1.4),
        )

    columns = (
        *("conv", "V", "zeros", "cuDNN", "here", "floor", "TFLOP/s of what is kept"),
        "cuDNN : here",
    )
    what = "batch 512, forward, lists included."
    return timings(results.read("sparse_conv_vector_h200"), what, columns, cells)


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


def sweep() -> list[str]:
    """In how many of all convs the kernels are faster."""
    return sparse_conv_sweep_page.summary()


def update_sweep(*, check: bool, stale: str) -> int:
    """Writes the page of all convs, or takes it away; see `marked.update`."""
    new = sparse_conv_sweep_page.page()
    old = SWEEP.read_text(encoding="utf-8") if SWEEP.exists() else ""
    if check and new != old:
        print(stale)
        return 1
    if not new:
        SWEEP.unlink(missing_ok=True)
    elif new != old:
        SWEEP.write_text(new, encoding="utf-8")
    return 0


TABLES = (sweep, weight_gradient, tuned, single_weights, vector_times, vectors)


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables of docs/sparse_convolutions.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    tables = {BEGIN.format(table.__name__): table() for table in TABLES}
    stale = "{} differs from docs/results: run python benchmarks/sparse_conv_page.py"
    codes = (
        marked.update(PAGE, tables, check=options.check, stale=stale.format(PAGE.name)),
        update_sweep(check=options.check, stale=stale.format(SWEEP.name)),
    )
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
