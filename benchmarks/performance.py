"""Writes docs/performance.md and docs/steps.svg from the measurements in docs/results.

    python benchmarks/performance.py

Nothing in that page is typed by hand but its explanations, which are in `benchmarks/texts`.
"""

from collections.abc import Sequence
from typing import Any

from results import ROOT, line_of, read, short_name, verdict
from step_tables import SMALL_BATCH, kept_section, own_model_section, steps_picture, steps_section

TEXTS = ROOT / "benchmarks/texts"
# Share of the copy rate that is asked for at the largest size.
MARKS = {"threshold": 0.6}
DEFAULT_MARK = 0.7
# What no mark is set for.
NO_MARK = ("copy", "jnp.sort", "jax.lax.top_k", "thresholds of 50 parts")


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
        own_model_section(read("own_model_h200")),
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
