"""Writes docs/performance.md and docs/steps.svg from the measurements in docs/results.

    python benchmarks/performance.py

Nothing in that page is typed by hand but its explanations, which are in `benchmarks/texts`.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from swat_jax import report_figures

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
TEXTS = ROOT / "benchmarks/texts"
# Share of the copy rate that is asked for at the largest size.
MARKS = {"threshold": 0.6}
DEFAULT_MARK = 0.7
# Peak memory of u90 that is asked for, of dense.
MEMORY_MARKS = {
    "imagenet_resnet50": 0.62,
    "imagenet_wrn50_2": 0.65,
    "cifar10_wrn16_8": 0.64,
    "cifar10_resnet18": 0.68,
    "cifar10_vgg16": 0.74,
    "cifar10_densenet121": 0.66,
}
# Time of u90 that is asked for, of dense: at the paper's period, and with exact thresholds always.
TIME_MARKS = {
    "imagenet_resnet50": (0.87, 0.92),
    "imagenet_wrn50_2": (0.91, 0.95),
    "cifar10_wrn16_8": (0.95, 1.0),
    "cifar10_resnet18": (0.95, 1.0),
    "cifar10_vgg16": (0.95, 1.0),
    "cifar10_densenet121": (0.95, 1.0),
}
NAMES = {
    "imagenet_resnet50": "ResNet-50",
    "imagenet_wrn50_2": "WRN-50-2",
    "cifar10_wrn16_8": "WRN-16-8",
    "cifar10_resnet18": "ResNet-18",
    "cifar10_vgg16": "VGG-16",
    "cifar10_densenet121": "DenseNet-121",
}
# At batch 128 the paper's period alone is asked for, and a peak near the byte count.
SMALL_BATCH, SMALL_BATCH_TIME_MARK, SMALL_BATCH_MEMORY_MARK = 128, 1.0, 1.05
# Images per second of the authors' published code at batch 128, measured on an NVIDIA H200, and how
# many times as many are asked for.
AUTHORS = {
    "cifar10_wrn16_8": (2589, 13),
    "cifar10_resnet18": (2054, 19),
    "cifar10_vgg16": (3023, 19),
    "cifar10_densenet121": (369, 19),
}
# What no mark is set for.
NO_MARK = ("copy", "jnp.sort", "jax.lax.top_k", "thresholds of 50 parts")


def line_of(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def ops_section(found: dict[str, Any]) -> str:
    rows = found["ops"]
    largest = max(row["values"] for row in rows)
    at_largest = {row["op"]: row for row in rows if row["values"] == largest}
    copy = at_largest["copy"]["gb_per_s"]
    lines = [
        "## Ops",
        "",
        f"Measured on an {found['device']}, {found['date']}, jax {found['versions']['jax']}, CUDA",
        f"{found['library'].get('cuda', '?')}: `python benchmarks/ops.py`. Values are",
        f"{found['dtype']}, {found['channels']} channels, 90 % sparsity.",
        "",
        "Bytes are those an op has to move: every input read once, every result written once. The",
        f"share is their rate over that of a device-to-device copy of {largest / 1e6:.0f} M values",
        f"in the same run, {copy:.0f} GB/s.",
        "",
        f"At {largest / 1e6:.0f} M values, with the mark that is set for each op:",
        "",
        "| op | ms | GB | GB/s | of the copy rate | mark |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in at_largest.values():
        share, mark = row["gb_per_s"] / copy, MARKS.get(row["op"], DEFAULT_MARK)
        # The printed share decides: what reads as 60 % must not be called a miss of 60 %.
        told = f"{mark:.0%}: {verdict(round(share, 2) >= mark)}"
        told = "" if row["op"] in NO_MARK else told
        moved, rate = f"{row['bytes'] / 1e9:.2f}", f"{row['gb_per_s']:.0f}"
        lines.append(line_of(row["op"], f"{row['ms']:.3f}", moved, rate, f"{share:.0%}", told))
    lines += ["", *sorting_lines()]
    sizes = sorted({row["values"] for row in rows})
    lines += [
        "",
        "Milliseconds by size (millions of values); small tensors stay in the cache between the",
        "repetitions, and the smallest ones show what a launch costs. The copy is timed from the",
        "host, which is too slow for sizes below the largest; it is left out there.",
        "",
        line_of("op", *(f"{size / 1e6:.0f}" for size in sizes)),
        "|---" * (len(sizes) + 1) + "|",
    ]
    for op in at_largest:
        by_size = {row["values"]: row["ms"] for row in rows if row["op"] == op}
        shown = [
            f"{by_size[size]:.3f}" if size in by_size and (op != "copy" or size == largest) else ""
            for size in sizes
        ]
        lines.append(line_of(op, *shown))
    return "\n".join(lines)


def sorting_lines() -> list[str]:
    """How much faster a threshold is than what it replaces: a run of its own, they take long."""
    ms = {row["op"]: row["ms"] for row in read("ops_h200_sorting")["ops"]}
    top_k, sort = (ms[op] / ms["threshold"] for op in ("jax.lax.top_k", "jnp.sort"))
    return [
        f"In another run on the same machine `threshold` took {ms['threshold']:.3f} ms,",
        f"`jax.lax.top_k` {top_k:.0f} times as long (mark: 100), `jnp.sort` {sort:.0f} times (8).",
    ]


def steps_section(found: dict[str, Any]) -> str:
    lines = [
        "## Training steps",
        "",
        f"Measured on an {found['device']}, {found['date']}, jax {found['versions']['jax']}:",
        "`python benchmarks/steps.py`. bfloat16, synthetic images on the device; dense is stock",
        "Flax. P is the number of steps between exact thresholds, and the time is the mean over a",
        "period. Peak memory is what the allocator saw; beside it what XLA plans for a whole step,",
        "and what layers keep for their backward passes (`python -m swat_jax.flops --bytes`).",
        "Ratios are to dense in the same group of a run; where a network had several groups, the",
        "table has dense once. At batch 128 a hundred steps are dispatched at once (in training",
        "it is 78) on data that lie on the device, with augmentation.",
        "",
    ]
    memory = {"xla_mib": "XLA's MiB", "kept_mib": "kept MiB"}
    heads = ("network, batch", "method", "P", "ms", "of dense", "images/s", "peak MiB", "of dense")
    heads += tuple(memory.values())
    lines += [line_of(*heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in found["steps"]:
        cells = (
            f"{row['network']}, {row['batch']}",
            row["method"],
            row["threshold_every_steps"],
            f"{row['ms']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['memory_ratio']:.2f}",
            *("" if row[key] is None else f"{row[key]:.0f}" for key in memory),
        )
        lines.append(line_of(*cells))
    lines += [
        "",
        "![u90: time and memory of dense](steps.svg)",
        "",
        *marks_lines(found["steps"]),
        "",
        *small_batch_lines([found, read("steps_h100")]),
    ]
    return "\n".join(lines)


def marks_lines(rows: list[dict[str, Any]]) -> list[str]:
    """u90 beside what is asked for; a printed ratio that equals its mark meets it."""
    lines = [
        "u90 beside the marks that are set for it, as shares of dense; where dense was measured in",
        "several groups of a network, of the fastest:",
        "",
        "| network, batch | time, paper's P | mark | time, P = 1 | mark | peak memory | mark |",
        "|---|---:|---|---:|---|---:|---|",
    ]
    for (network, batch), found in shares(rows).items():
        if batch == SMALL_BATCH:
            continue
        marks = (*TIME_MARKS[network], MEMORY_MARKS[network])
        cells: list[str] = []
        for ratio, mark in zip(found, marks, strict=True):
            cells += [f"{ratio:.2f}", f"{mark:.2f}: {verdict(round(ratio, 2) <= mark)}"]
        lines.append(line_of(f"{network}, {batch}", *cells))
    return lines


def shares(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[float, float, float]]:
    """What u90 takes of dense by network and batch: time, time with exact thresholds, memory."""
    by_name = {(row["network"], row["batch"], row["method"]): row for row in rows}
    found = {}
    for (network, batch, method), row in by_name.items():
        if method == "u90":
            exact = by_name[network, batch, "u90 exact"]
            every = [one["dense_ms"] for key, one in by_name.items() if key[:2] == (network, batch)]
            dense = min(every)
            found[network, batch] = row["ms"] / dense, exact["ms"] / dense, row["memory_ratio"]
    return found


def steps_picture(rows: list[dict[str, Any]]) -> str:
    """Bars of what `shares` says, as SVG."""
    figure, axes = report_figures.figure_of(8, 3)
    found = {key: value for key, value in shares(rows).items() if key[1] != SMALL_BATCH}
    names = ("time, paper's period", "time, exact at every step", "peak memory")
    for number, name in enumerate(names):
        places = [place + 0.27 * (number - 1) for place in range(len(found))]
        bars = axes.bar(places, [value[number] for value in found.values()], 0.27, label=name)
        axes.bar_label(bars, fmt="%.2f", size=6)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(list(range(len(found))))
    axes.set_xticklabels([f"{NAMES[network]}, {batch}" for network, batch in found], size=8)
    axes.set_ylabel("of dense")
    axes.set_ylim(0, 1.45)
    axes.legend(ncols=3, prop={"size": 8})
    return report_figures.svg_of(figure)


def small_batch_lines(reports: list[dict[str, Any]]) -> list[str]:
    counts = {
        row["network"]: row["activations_mib"] + row["weights_mib"] + row["state_mib"]
        for row in read("kept")["kept"]
        if (row["method"], row["batch"]) == ("u90", SMALL_BATCH)
    }
    lines = [
        f"u90 at batch {SMALL_BATCH} and the paper's P. The authors' published code was measured",
        "on an NVIDIA H200, at the same batch. The peak holds what cuDNN's algorithms took when",
        "they were chosen; XLA's plan has not. Rows of the H100 are of an earlier version, and of",
        "steps that were dispatched one by one; for their time see the CUDA graphs below.",
        "",
        line_of(
            *("network", "GPU", "of dense", "mark", "images/s", "times the authors'", "mark"),
            *("peak MiB", "of the byte count", "mark", "XLA's MiB", "of the byte count"),
        ),
        "|---|---|---:|---|---:|---:|---|---:|---:|---|---:|---:|",
    ]
    shown = set[str]()
    for device, row in ((one["device"], row) for one in reports for row in one["steps"]):
        if row["method"] != "u90" or row["batch"] != SMALL_BATCH or row["network"] in shown:
            continue
        shown.add(row["network"])
        network, ratio, count = row["network"], row["time_ratio"], counts[row["network"]]
        authors, times = AUTHORS[network]
        most = SMALL_BATCH_MEMORY_MARK
        rate = row["images_per_second"] / authors
        peak, planned = row["peak_mib"] / count, row["xla_mib"] / count
        lines.append(
            line_of(
                network,
                short_name(device),
                f"{ratio:.2f}",
                mark_of(SMALL_BATCH_TIME_MARK, round(ratio, 2) <= SMALL_BATCH_TIME_MARK, device),
                f"{row['images_per_second']:.0f}",
                f"{rate:.1f}",
                mark_of(times, rate >= times, device),
                f"{row['peak_mib']:.0f}",
                f"{peak:.2f}",
                mark_of(most, round(peak, 2) <= most, device),
                f"{row['xla_mib']:.0f}",
                f"{planned:.2f}",
            )
        )
    return lines


def mark_of(mark: float, met: bool, device: str) -> str:
    """A mark and whether it is met: marks are set for one GPU."""
    return f"{mark:g}: {verdict(met) if 'H200' in device else 'not measured'}"


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def kept_section(found: dict[str, Any]) -> str:
    lines = [
        "### What has to be kept",
        "",
        "MiB, by `python benchmarks/kept.py`: what layers keep for their backward passes, in",
        "bfloat16, and with weights and momentum in float32 what a peak cannot go below.",
        "",
        "| network, batch | method | activations | masked weights | with state | of dense | mark |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in found["kept"]:
        whole = sum(row[part] for part in ("activations_mib", "weights_mib", "state_mib"))
        mark = (
            MEMORY_MARKS[row["network"]] if row["method"] == "u90" and row["batch"] > 128 else None
        )
        lines.append(
            line_of(
                f"{row['network']}, {row['batch']}",
                row["method"],
                f"{row['activations_mib']:.0f}",
                f"{row['weights_mib']:.0f}",
                f"{whole:.0f}",
                f"{row['memory_ratio']:.2f}",
                "" if mark is None else f"{mark:.2f}",
            )
        )
    return "\n".join(lines)


def profile_section(found: dict[str, Any], copy_rate: float | None) -> str:
    """A network's kernels by kind; without a copy rate there is nothing to set them against."""
    head = f"{found['network']}, batch {found['batch']}"
    lines = [f"{head}:" if copy_rate else f"{head}, on an {found['device']}:", ""]
    for step in found["steps"]:
        busy, idle = step["kernel_ms"], step["idle_ms"]
        lines += [
            f"{step['method']}: {busy:.1f} ms in kernels, {idle:.1f} ms between them.",
            "",
            "| | ms | launches | GB | GB/s |" + (" ms at the copy rate |" if copy_rate else ""),
            "|---|---:|---:|---:|---:|" + ("---:|" if copy_rate else ""),
        ]
        for kind in step["kinds"]:
            cells = [kind["kind"], f"{kind['ms']:.2f}", f"{kind['launches']:.0f}"]
            # Thresholds that are reused move next to nothing.
            if kind.get("bytes", 0) > 5e7:
                moved = kind["bytes"] / 1e9
                cells += [f"{moved:.2f}", f"{kind['gb_per_s']:.0f}"]
                cells += [f"{moved / copy_rate * 1e3:.2f}"] if copy_rate else []
            else:
                cells += [""] * (3 if copy_rate else 2)
            lines.append(line_of(*cells))
        lines.append("")
    return "\n".join(lines)


def equivalence_section(found: dict[str, Any]) -> str:
    told = found["verdict"]
    seeds = len(found["losses"]["cuda"])
    lines = [
        "## Training with the kernels and without",
        "",
        f"Measured on an {found['device']}, {found['date']}, with",
        f"`python benchmarks/equivalence.py --data cifar10.npz --seeds {seeds}`:",
        f"{found['network']}, {found['method']},",
        f"P = {found['threshold_every_steps']}, {found['images']} images, batch {found['batch']},",
        f"{found['steps']} steps, means over {told['window']} steps.",
        "",
        "![Loss curves with both backends](equivalence.svg)",
        "",
        f"The first losses differ by {told['first_loss_difference']:.4f} at most. Thresholds turn",
        "the last bit of a sum into another mask, so curves part as those of two seeds do. The",
        "question is how far: the largest difference of both backends at one seed, over all",
        f"windows, is {told['difference']:.2f}; the bound is that of two seeds of plain JAX,",
        f"{told['bound']:.2f}: it {'holds' if told['holds'] else 'does not hold'}. By windows",
        f"{told['windows_within']} of {told['windows']} differences are within that of theirs.",
        f"Means over all windows differ by {told['mean_difference']:.3f}, their bound is",
        f"{told['mean_bound']:.3f}.",
    ]
    twins = read("equivalence_twins_h200")["verdict"]
    within = f"{twins['windows_within']} of {twins['windows']}"
    lines += [
        "The kernels' definitions in plain JAX, in their place on the same GPU, differ from",
        f"training without packing by {twins['difference']:.2f}, as means by",
        f"{twins['mean_difference']:.3f}; {within} windows are within the bound.",
        "The largest difference is one of as many as there are seeds, its bound one of all pairs",
        "of seeds, so it is the easier to meet the more there are. Means have no such advantage.",
    ]
    return "\n".join(lines)


def several_section(reports: Sequence[dict[str, Any]]) -> str:
    rows: dict[str, dict[int, float]] = {}
    for found in reports:
        mps = " under MPS" if found["mps"] else ""
        for row in found["rows"]:
            way = {"processes": f"processes{mps}", "vmap": "seeds under `jax.vmap`"}[row["way"]]
            counted = rows.setdefault(f"{short_name(found['device'])}, {way}", {})
            counted[row["at_once"]] = row["images_per_second"]
    counts = sorted({count for counted in rows.values() for count in counted})
    lines = [
        "## Several runs on one GPU",
        "",
        f"Images per second of all runs together, {reports[0]['network']}, {reports[0]['method']}:",
        "`python benchmarks/several_runs.py`. MPS is NVIDIA's service through which kernels of",
        "several processes run at the same time (`nvidia-cuda-mps-control -d`). Without it they",
        "take turns, and lose a little. Seeds under `jax.vmap` turn convs into grouped ones, and",
        "the branches of thresholds that are refreshed early into selections that compute both",
        "sides. Those of the H200 were counted until the last process had ended and are as printed",
        "by the runs, whose files were lost; those of the H100 while all work. On the H200 one",
        "process alone differs by a tenth between two runs.",
        "",
        line_of("", *(f"{count} at once" for count in counts)),
        "|---" + "|---:" * len(counts) + "|",
    ]
    for name, counted in rows.items():
        lines.append(line_of(name, *(f"{counted[n]:,.0f}" if n in counted else "" for n in counts)))
    return "\n".join(lines)


def graphs_section(found: dict[str, Any]) -> str:
    """What launching takes at a small batch."""
    rows = {(row["network"], row["method"], row["graphs"]): row["ms"] for row in found["steps"]}
    ways = list(dict.fromkeys(row["graphs"] for row in found["steps"]))
    lines = [
        "### CUDA graphs at batch 128",
        "",
        f"ms of a step on an {found['device']}, {found['date']}:",
        "`python benchmarks/cuda_graphs.py` without CUDA graphs, with XLA's default, and with",
        "convolutions in them (`XLA_FLAGS=--xla_gpu_enable_command_buffer=+CONVOLUTION`).",
        *([f"({found['note'][0].upper()}{found['note'][1:]}.)"] if "note" in found else []),
        "",
        line_of("network, batch", "method", *ways),
        "|---|---" + "|---:" * len(ways) + "|",
    ]
    for network, method in dict.fromkeys(key[:2] for key in rows):
        shown = (rows.get((network, method, way)) for way in ways)
        cells = ("" if ms is None else f"{ms:.2f}" for ms in shown)
        lines.append(line_of(f"{network}, {SMALL_BATCH}", method, *cells))
    return "\n".join(lines)


def short_name(device: str) -> str:
    """H100 of NVIDIA H100 80GB HBM3."""
    return device.removeprefix("NVIDIA ").split()[0]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def page() -> str:
    """docs/performance.md."""
    ops = read("ops_h200")
    copy_rate = max(row["gb_per_s"] for row in ops["ops"] if row["op"] == "copy")
    profiles = [
        profile_section(read(f"step_profile_{network}_h200"), copy_rate)
        for network in ("resnet50", "wrn16_8", "resnet18", "vgg16_128")
    ]
    profiles += [
        profile_section(read(f"step_profile_{network}_h100"), None)
        for network in ("wrn50_2", "densenet121", "resnet18_128", "wrn16_8_128")
    ]
    parts = [
        "# Performance",
        "",
        "Made by `benchmarks/performance.py` from the files in `docs/results`.",
        "",
        steps_section(read("steps_h200")),
        "",
        (TEXTS / "steps.md").read_text(),
        kept_section(read("kept")),
        "",
        "### Where the time goes",
        "",
        f"Measured on an {ops['device']}, whose copy rate is {copy_rate:.0f} GB/s, with",
        "`python benchmarks/step_profile.py`: kernels of one step, traced one by one without CUDA",
        "graphs. Bytes are what an op of ours has to move.",
        "",
        *profiles,
        graphs_section(read("cuda_graphs_h100")),
        "",
        ops_section(ops),
        "",
        (TEXTS / "ops.md").read_text(),
        several_section([read(f"several_runs_{run}") for run in ("h200", "mps_h200", "mps_h100")]),
        "",
        equivalence_section(read("equivalence_h200")),
        "",
    ]
    return "\n".join(parts)


def main() -> None:
    (ROOT / "docs/performance.md").write_text(page())
    (ROOT / "docs/steps.svg").write_text(steps_picture(read("steps_h200")["steps"]))


if __name__ == "__main__":
    main()
