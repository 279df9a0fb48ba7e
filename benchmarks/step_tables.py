"""Time and memory of training steps beside what is asked of them: tables and a picture."""

from typing import Any

import own_model
from results import NAMES, line_of, mark_of, read, short_name, verdict

from swat_jax import report_figures

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
        "u90 beside the marks that are set for it, as shares of dense, where dense was measured in",
        "several groups of a network, of the fastest; the time with tuned algorithms where it was",
        "measured, that of exact thresholds without them:",
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
    """What u90 takes of dense by network and batch: time, time with exact thresholds, memory.

    The time is that with tuned algorithms where it was measured: they come with the package. That
    of exact thresholds is always the plain way's.
    """
    by_name = {(row["network"], row["batch"], row["method"]): row for row in rows}
    found = {}
    for (network, batch, method), row in by_name.items():
        if method == "u90":
            exact = by_name[network, batch, "u90 exact"]
            every = [one["dense_ms"] for key, one in by_name.items() if key[:2] == (network, batch)]
            dense = min(every)
            fastest = by_name.get((network, batch, "u90, tuned"), row)
            found[network, batch] = fastest["ms"] / dense, exact["ms"] / dense, row["memory_ratio"]
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


def own_model_section(found: dict[str, Any]) -> str:
    """A user's own network beside ours."""
    lines = [
        "### A network of one's own",
        "",
        f"Measured on an {found['device']}, {found['date']}, jax {found['versions']['jax']}:",
        "`python benchmarks/own_model.py`. ResNet-50 as stock Flax NNX layers write it, made",
        "sparse by `swat_jax.sparsify`, its forward pass by `swat_jax.fuse`, beside this package's",
        f"network in the same run, batch {found['steps'][0]['batch']}.",
        f"Mark: {own_model.MOST:g} of its time and of its memory.",
        "",
        line_of(
            *("method", "P", "stock layers, ms", "this package's, ms", "ratio"),
            *("stock layers, peak MiB", "this package's, peak MiB", "ratio", "mark"),
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for pair in own_model.pairs(found["steps"]):
        cells = [pair.ours["method"], pair.ours["threshold_every_steps"]]
        for key, digits in (("ms", 2), ("peak_mib", 0)):
            cells += [f"{one[key]:.{digits}f}" for one in pair] + [f"{pair.ratio(key):.3f}"]
        lines.append(line_of(*cells, verdict(pair.is_within)))
    return "\n".join(lines)
