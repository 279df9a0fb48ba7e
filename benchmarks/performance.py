"""Writes docs/performance.md from the measurements in docs/results.

    python benchmarks/performance.py

Nothing in that page is typed by hand but its explanations, which are here.
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
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
NOT_OURS = ("copy", "jnp.sort", "jax.lax.top_k")


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
        verdict = "" if row["op"] in NOT_OURS else f"{mark:.0%}: "
        # The printed share decides: what reads as 60 % must not be called a miss of 60 %.
        verdict += "" if not verdict else "met" if round(share, 2) >= mark else "missed"
        moved, rate = f"{row['bytes'] / 1e9:.2f}", f"{row['gb_per_s']:.0f}"
        lines.append(line_of(row["op"], f"{row['ms']:.3f}", moved, rate, f"{share:.0%}", verdict))
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
    found = json.loads((RESULTS / "ops_h200_sorting.json").read_text())["ops"]
    largest = max(row["values"] for row in found)
    ms = {row["op"]: row["ms"] for row in found if row["values"] == largest}
    top_k, sort = (ms[op] / ms["threshold"] for op in ("jax.lax.top_k", "jnp.sort"))
    return [
        "In another run, of the kernels before the present ones, `threshold` took",
        f"{ms['threshold']:.3f} ms, `jax.lax.top_k` {top_k:.0f} times as long,",
        f"`jnp.sort` {sort:.0f} times.",
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
        "Ratios are to dense in the same run.",
        "",
    ]
    memory = {"xla_mib": "XLA's MiB", "kept_mib": "kept MiB"}
    heads = ("network, batch", "method", "P", "ms", "of dense", "images/s", "peak MiB", "of dense")
    heads += tuple(memory.values())
    lines += [line_of(*heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in found["steps"]:
        cells = (
            f"{row['network']}, {row['batch']}",
            row["method"] + (" (*)" if row.get("earlier_code") else ""),
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
        "(*) Of a run on the same day before dropout became part of batch norm's pass and before",
        "weight gradients lay flat for the update: sparse rows would be a little faster now.",
        "",
        *marks_lines(found["steps"]),
    ]
    return "\n".join(lines)


def marks_lines(rows: list[dict[str, Any]]) -> list[str]:
    """u90 beside what is asked for; a printed ratio that equals its mark meets it."""
    lines = [
        "u90 beside the marks that are set for it, as shares of dense:",
        "",
        "| network, batch | time, paper's P | mark | time, P = 1 | mark | peak memory | mark |",
        "|---|---:|---|---:|---|---:|---|",
    ]
    by_name = {(row["network"], row["batch"], row["method"]): row for row in rows}
    for (network, batch, method), row in by_name.items():
        if method != "u90":
            continue
        exact = by_name[network, batch, "u90 exact"]
        cells: list[str] = []
        for ratio, mark in (
            (row["time_ratio"], TIME_MARKS[network][0]),
            (exact["time_ratio"], TIME_MARKS[network][1]),
            (row["memory_ratio"], MEMORY_MARKS[network]),
        ):
            verdict = "met" if round(ratio, 2) <= mark else "missed"
            cells += [f"{ratio:.2f}", f"{mark:.2f}: {verdict}"]
        lines.append(line_of(f"{network}, {batch}", *cells))
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


def profile_section(found: dict[str, Any], copy_rate: float) -> str:
    earlier = found.get("earlier_code", False)
    lines = [
        f"{found['network']}, batch {found['batch']}"
        + (", before dropout became part of batch norm's pass:" if earlier else ":"),
        "",
    ]
    for step in found["steps"]:
        busy, idle = step["kernel_ms"], step["idle_ms"]
        lines += [
            f"{step['method']}: {busy:.1f} ms in kernels, {idle:.1f} ms between them.",
            "",
            "| | ms | launches | GB | GB/s | ms at the copy rate |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for kind in step["kinds"]:
            shown = ("", "", "")
            # Thresholds that are reused move next to nothing.
            if kind.get("bytes", 0) > 5e7:
                moved = kind["bytes"] / 1e9
                floor = moved / copy_rate * 1e3
                shown = (f"{moved:.2f}", f"{kind['gb_per_s']:.0f}", f"{floor:.2f}")
            cells = (kind["kind"], f"{kind['ms']:.2f}", f"{kind['launches']:.0f}", *shown)
            lines.append(line_of(*cells))
        lines.append("")
    return "\n".join(lines)


STEP_MISSES = """### Where a mark is missed

The marks were set for an NVIDIA H200, whose memory is a third faster than that of the H100 that
these figures are of, at the same arithmetic; the ratios would be somewhat lower there.

* **Where the time of ResNet-50 goes**: see the profile below. Convolutions take what they take in
  a dense step, but for the stem (next point). Our ops move 62 GB, which would take 22.5 ms at the
  rate of a copy, and take 25.3; a dense step spends 26.0 ms in XLA's fusions. Our batch norm alone,
  without sparsity and with the stem as it was, takes 0.94 of a dense step.
* **What was tried, and what came of it**, in ms of a ResNet-50 step at batch 256: the stem's conv
  with strides folded into channels, 3.0 to 1.1 with all that belongs to it (1.5 to 2 were
  expected); weight gradients made flat before the update, which then happens in place, 0.3 in
  104 copies and in slow fusions (0.3 were expected), after a barrier without it had changed
  nothing; packing again in the kernel that finds no room in place of one more launch, nothing
  measurable (0.17 were expected): the kernel takes longer by what the launch took. Together 46.3
  to 44.3.
* **WRN-16-8**: dropout took 1.1 ms in passes of its own, beside 0.85 for its random bits, which
  dense needs too. In the pass of batch norm it costs a bit per value: with flat weight gradients
  14.2 to 13.5 ms, 1.12 to 1.05 of dense (12.9 were expected).
* **Small networks** pay for launches: a sparse ResNet-18 had 640 of them where dense has 524, and
  each takes 2 to 5 us however little it does. Thresholds of weights (one launch a layer though
  they are reused), the second step of every sum, and copies of thresholds are the next to go:
  about 0.4 ms of 8.2. A conv's bias before a batch norm has a gradient that is zero but for
  rounding, which takes 0.25 ms to add up; and with P = 10 a refresh of 1.7 ms counts 0.17.
* **P = 1** costs a second pass over what is normalised: 4.5 ms of ResNet-50. Not tried yet: to pack
  a little more than is kept, by the last threshold, and to find the exact one among what was
  packed, an eighth of the values.
* Beyond that: unpacking within the weight gradient (2.5 ms), sums in the epilogue of the forward
  convs (2.4 ms), batch norm and max pooling of the stem in one pass (0.8 ms).
* **Memory of ResNet-50.** Kept are 5,427 MiB of inputs of batch norm, 168 MiB of signs, 733 MiB of
  packed activations and 49 MiB of who won in max pooling: 6,377 MiB, 0.62 of the dense peak
  (`python -m swat_jax.flops --config configs/imagenet_resnet50.py:u90 --bytes` adds images, masked
  weights and small arrays). Weights, momentum, masked weights and images add 281 MiB. Going lower
  takes keeping less: the inputs of the norms of projecting shortcuts are 735 MiB, that of the
  stem's norm 392 MiB.

DenseNet-121 and batch 128 have not been measured, nor has the naive form of ResNet-50.
"""

MISSES = """### Where a mark of an op is missed

* **threshold** counts only what a sample of 8192 values says is large enough, about an eighth of
  the values at 90 % sparsity.
* **pack** and **normalize + given pack** read their input once. The profiler (Nsight Compute, H100)
  says of the kernels that this table is of: 146 and 265 instructions for eight values of every
  lane, where some 60 and 90 do the work; a tenth of the time at the barrier where the counts of all
  blocks are awaited; misses of the instruction cache. See below for what followed from it.
  Also tried, before: more blocks on a multiprocessor, 0.33 ms; a first pass that marks what is kept
  and a second that gathers it, 0.39 ms, with the norm 0.48; a span of four tiles in one kernel for
  everything, 0.33 and 0.43 ms.
* **normalize + exact pack** needs a second pass by its nature, which costs what `pack` costs.
"""


def present_section(found: dict[str, Any]) -> str:
    """Kernels that have been measured in parts only, and on another device."""
    lines = [
        "## The present kernels that pack",
        "",
        f"Measured on an {found['device']}, {found['date']}, jax {found['versions']['jax']}, with",
        "`benchmarks/ops.py` while they were written; the whole table has not been measured anew,",
        "and `pack` still misses its mark. Spans of values that are whole are packed without",
        "looking for their end, pairs of 16-bit values are converted in one instruction, and",
        "several rounds may wait in shared memory for their place. Sums over rows go from the last",
        "row to the first, as their input is in the cache then, and need no counters that are",
        "cleared.",
        "",
        f"At {found['values'] / 1e6:.0f} M values; a copy takes {found['copy_ms']:.3f} ms:",
        "",
        "| op | ms | of the copy rate |",
        "|---|---:|---:|",
    ]
    for row in found["ops"]:
        lines.append(line_of(row["op"], f"{row['ms']:.3f}", f"{row['share_of_copy']:.0%}"))
    lines += [
        "",
        "Deeper queues of loads brought `pack` from 0.33 to 0.28 ms; rounds that wait, to 0.27,",
        "and with the norm from 0.46 to 0.41. Without effect: writing what was packed without",
        "branches, and the ranks of eight tiles side by side.",
    ]
    return "\n".join(lines)


def main() -> None:
    def read(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    packing = read("packing_h100")
    copy_rate = 4 * packing["values"] / packing["copy_ms"] / 1e6  # GB/s; 2 bytes read, 2 written
    profiles = [
        profile_section(read(f"step_profile_{network}_h100"), copy_rate)
        for network in ("resnet50", "wrn16_8", "resnet18")
    ]
    parts = [
        "# Performance",
        "",
        "Made by `benchmarks/performance.py` from the files in `docs/results`.",
        "",
        steps_section(read("steps_h100")),
        "",
        STEP_MISSES,
        kept_section(read("kept")),
        "",
        "### Where the time goes",
        "",
        f"Measured on an {packing['device']}, whose copy rate is {copy_rate:.0f} GB/s, with",
        "`python benchmarks/step_profile.py`: kernels of one step, traced one by one without CUDA",
        "graphs. Bytes are what an op of ours has to move.",
        "",
        *profiles,
        ops_section(read("ops_h200")),
        "",
        MISSES,
        present_section(packing),
        "",
    ]
    (ROOT / "docs/performance.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
