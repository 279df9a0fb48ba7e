r"""Do the CUDA kernels train as plain JAX does? The loss of every step with both, seed by seed.

    python benchmarks/equivalence.py --data cifar10.npz --output docs/results/equivalence_h200.json
    python benchmarks/equivalence.py --plot docs/results/equivalence_h200.json --svg OUT.svg
    python benchmarks/equivalence.py --backends twins xla --network resnet8 --steps 4 --batch 16 \
        --window 2 --seeds 2   # without a GPU, on synthetic images

Trains `configs/cifar10_resnet18.py:u90` a few hundred steps on the device's own data path. At the
same seed weights, images, their order and augmentation are the same; what differs is the order in
which sums are taken, and a threshold turns that into another mask sooner or later. So curves part,
as those of two seeds do, and the question is how far.

With losses as means over windows of steps, let ``difference`` be the largest difference between
the two backends at the same seed, over all windows and seeds, and ``bound`` the largest difference
between two seeds of the second backend, over all windows and pairs of seeds. The verdict is
``difference <= bound``, and the same for the means over all windows, so that a small difference
that stays does not hide behind the first steps.

Every backend is a process, both at once; its seeds share one compiled program. "cuda" packs
activations and has batch norm in one op, "xla" is the same config without kernels: neither.
"twins" is "cuda" with every kernel replaced by its definition in jax.numpy.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

CONFIG = "configs/cifar10_resnet18.py"
# Backend of the ops, and settings of the config.
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cuda": ("cuda", {}),
    "xla": ("xla", {}),
    "twins": ("xla", {"sparsity.pack": True, "model.fused_batch_norm": True}),
}
# Losses of a step that differ by no more count as alike.
ALIKE = 0.01
NAMES = (("train_images", "train_labels"), ("x_train", "y_train"))

Losses = Sequence[Sequence[float]]  # of each seed, of each step


def train(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """The losses of all seeds; imports JAX, which the parent must not."""
    import jax
    import numpy as np

    from swat_jax import config_file, data, data_parallel, kernels, training_setup

    config: Any = config_file.load(f"{CONFIG}:{options.method}")
    config.batch_size = options.batch
    config.model.name = options.network
    config.precision = options.precision
    config.update_from_flattened_dict(BACKENDS[backend][1])
    config.data.source = "synthetic"
    dataset = data.load(config)
    images, labels = dataset.arrays("train")
    info = dataset.info
    if options.data:
        with np.load(options.data) as file:
            names = next(names for names in NAMES if names[0] in file)
            images, labels = file[names[0]], file[names[1]].ravel().astype(np.int32)
        info = dataclasses.replace(info, name=options.data, num_train=len(images))
    trainer, make_state = training_setup.make_trainer(config, info, data_parallel.make_mesh(1))
    images = jax.device_put(images, trainer.replicated)
    labels = jax.device_put(labels, trainer.replicated)
    # XLA is slow in loops on a CPU.
    at_once = 1 if jax.default_backend() == "cpu" else options.steps_per_dispatch
    found = []
    for seed in range(options.seeds):
        # What is compiled does not depend on the seed; state and order of the images do.
        config.seed = seed
        state, done, losses = make_state(), 0, []
        orders = dataclasses.replace(trainer)
        while done < options.steps:
            epoch, position = divmod(done, trainer.steps_per_epoch)
            count = min(at_once, options.steps - done, trainer.steps_per_epoch - position)
            order = orders.epoch_order(epoch)
            state, metrics = trainer.train_steps(state, images, labels, order, count)
            losses.append(metrics["loss"])
            done += count
        found.append([round(float(x), 6) for x in np.concatenate(jax.device_get(losses))])
    return {
        "backend": kernels.backend(),
        "losses": found,
        "device": jax.devices()[0].device_kind,
        "images": info.num_train,
        "threshold_every_steps": config.sparsity.threshold_every_steps,
    }


def both(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the backends side by side; the contents of the JSON file."""
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for number, backend in enumerate(options.backends):
            environment = {
                **os.environ,
                "SWAT_JAX_BACKEND": BACKENDS[backend][0],
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }
            file = pathlib.Path(folder, f"{number}.json")
            command = [sys.executable, __file__, *sys.argv[1:], "--one", backend]
            process = subprocess.Popen([*command, "--output", str(file)], env=environment)
            processes.append((process, file))
        failed = [process.wait() for process, _ in processes]
        if any(failed):
            sys.exit(max(map(abs, failed)))
        results = [json.loads(file.read_text()) for _, file in processes]
    first, second = results
    verdict = compare(first["losses"], second["losses"], options.window)
    return {
        "date": datetime.date.today().isoformat(),
        "device": first["device"],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "network": options.network,
        "method": options.method,
        "threshold_every_steps": first["threshold_every_steps"],
        "precision": options.precision,
        "batch": options.batch,
        "steps": options.steps,
        "data": pathlib.Path(options.data).name if options.data else "synthetic",
        "images": first["images"],
        "verdict": verdict,
        "losses": dict(zip(options.backends, (one["losses"] for one in results), strict=True)),
    }


def windows(losses: Losses, window: int) -> list[list[float]]:
    """Means over windows of steps that do not overlap; what is left at the end is left out."""
    return [
        [statistics.fmean(one[at : at + window]) for at in range(0, len(one) - window + 1, window)]
        for one in losses
    ]


def compare(first: Losses, second: Losses, window: int) -> dict[str, Any]:
    """Whether two backends differ by more than seeds of the second do, see the top of the file."""
    one, other = windows(first, window), windows(second, window)
    if not one[0] or len(one) < 2:
        sys.exit("a comparison needs two seeds, and as many steps as a window has")
    pairs = list(itertools.combinations(other, 2))
    number = range(len(one[0]))
    differences = [max(abs(a[i] - b[i]) for a, b in zip(one, other, strict=True)) for i in number]
    bounds = [max(abs(a[i] - b[i]) for a, b in pairs) for i in number]
    # Comparisons with NaN say nothing.
    finite = all(map(math.isfinite, itertools.chain(*one, *other)))
    apart = (
        step
        for step in range(len(first[0]))
        if any(abs(a[step] - b[step]) > ALIKE for a, b in zip(first, second, strict=True))
    )
    mean = statistics.fmean(
        abs(a[i] - b[i]) for a, b in zip(one, other, strict=True) for i in number
    )
    mean_bound = statistics.fmean(abs(a[i] - b[i]) for a, b in pairs for i in number)
    return {
        "window": window,
        "difference": max(differences),
        "bound": max(bounds),
        "holds": finite and max(differences) <= max(bounds) and mean <= mean_bound,
        "finite": finite,
        # For judgement: the same window by window, and the means in place of the maxima.
        "windows": len(bounds),
        "windows_within": sum(a <= b for a, b in zip(differences, bounds, strict=True)),
        "mean_difference": mean,
        "mean_bound": mean_bound,
        "first_loss_difference": max(abs(a[0] - b[0]) for a, b in zip(first, second, strict=True)),
        "steps_alike": next(apart, len(first[0])),
        "differences": differences,
        "bounds": bounds,
    }


def render(found: dict[str, Any]) -> str:
    """The verdict as text."""
    verdict, names = found["verdict"], list(found["losses"])
    last = {name: windows(losses, verdict["window"]) for name, losses in found["losses"].items()}
    ends = ", ".join(
        f"{name} {' '.join(f'{curve[-1]:.3f}' for curve in curves)}"
        for name, curves in last.items()
    )
    answer = "holds" if verdict["holds"] else "DOES NOT HOLD"
    lines = [
        f"{found['network']}, {found['method']}, batch {found['batch']}, {found['steps']} steps",
        f"{len(found['losses'][names[0]])} seeds, {found['device']}, {found['data']}",
        f"largest difference of {names[0]} and {names[1]} at one seed: {verdict['difference']:.4f}",
        f"largest difference of two seeds of {names[1]}: {verdict['bound']:.4f}",
        f"both of means over {verdict['window']} steps; difference <= bound: {answer}",
        f"the same window by window: in {verdict['windows_within']} of {verdict['windows']}",
        f"means of both: {verdict['mean_difference']:.4f}, {verdict['mean_bound']:.4f}",
        f"first loss: differs by at most {verdict['first_loss_difference']:.6f}",
        f"losses differ by at most {ALIKE} for the first {verdict['steps_alike']} steps",
        f"last window: {ends}",
    ]
    return "\n".join(lines if verdict["finite"] else [*lines, "some losses are not finite"])


def svg(found: dict[str, Any]) -> str:
    """Both backends: the mean over seeds of smoothed losses, and the band that all seeds are in."""
    wide, high, left, top, right, bottom = 720, 400, 56, 48, 16, 48
    window = found["verdict"]["window"]
    curves = {name: windows(losses, window) for name, losses in found["losses"].items()}
    values = [value for one in curves.values() for curve in one for value in curve]
    low, span = min(values), max(max(values) - min(values), 1e-9)
    low, span = low - 0.05 * span, 1.1 * span
    steps = found["steps"]

    def x(step: float) -> str:
        return f"{left + step / steps * (wide - left - right):.1f}"

    def y(loss: float) -> str:
        return f"{high - bottom - (loss - low) / span * (high - top - bottom):.1f}"

    def points(line: Sequence[float]) -> list[str]:
        return [f"{x((i + 0.5) * window)},{y(value)}" for i, value in enumerate(line)]

    title = (
        f"{found['network']}, {found['method']}, batch {found['batch']}, {found['device']}: "
        f"training loss, means over {window} steps"
    )
    font = 'font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" {font}>',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-size="13">{title}</text>',
    ]
    for tick in range(5):
        loss, step = low + span * tick / 4, steps * tick / 4
        parts += [
            f'<path d="M{left},{y(loss)}H{wide - right}" stroke="#dddddd"/>',
            f'<text x="{left - 6}" y="{y(loss)}" dy="4" text-anchor="end">{loss:.2f}</text>',
            f'<text x="{x(step)}" y="{high - bottom + 18}" text-anchor="middle">{step:.0f}</text>',
        ]
    middle = (left + wide - right) / 2
    parts.append(f'<text x="{middle}" y="{high - 10}" text-anchor="middle">step</text>')
    colours = ("#d95f02", "#1f78b4")
    for number, (name, seeds) in enumerate(curves.items()):
        colour, by_window = colours[number], list(zip(*seeds, strict=True))
        band = [*points([max(one) for one in by_window])]
        band += reversed(points([min(one) for one in by_window]))
        mean = points([statistics.fmean(one) for one in by_window])
        dashes = ' stroke-dasharray="6 4"' if number else ""
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"{dashes}'
        place = left + 150 * number
        parts += [
            f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.2"/>',
            f'<polyline points="{" ".join(mean)}" {stroke}/>',
            f'<path d="M{place},34h24" {stroke}/>',
            f'<text x="{place + 30}" y="38">{name}, {len(seeds)} seeds</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Loss curves with the kernels and without.")
    parser.add_argument("--data", help=".npz with train_images and train_labels; else synthetic")
    parser.add_argument("--backends", nargs=2, default=["cuda", "xla"], choices=BACKENDS)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--method", default="u90")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--steps_per_dispatch", type=int, default=20)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--plot", metavar="FILE", help="such a file: train nothing, draw it")
    parser.add_argument("--svg", help="SVG file to write")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        pathlib.Path(options.output).write_text(json.dumps(train(options.one, options)))
        return 0
    if options.plot:
        found = json.loads(pathlib.Path(options.plot).read_text())
    else:
        found = both(options)
        if options.output:
            pathlib.Path(options.output).write_text(json.dumps(found) + "\n")
    if options.svg:
        pathlib.Path(options.svg).write_text(svg(found))
    print(render(found))
    return 0 if found["verdict"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
