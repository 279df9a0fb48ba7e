r"""Trains rows of the paper's tables at full length and keeps what came out.

    python benchmarks/reproduce.py --data DATA --runs runs --jobs 2 \
        --rows cifar10_resnet18:channel70 cifar10_resnet18:dense cifar10_vgg16:u90
    python benchmarks/reproduce.py --runs runs --pack parts
    python benchmarks/reproduce.py --runs runs --unpack parts

A row is CONFIG:METHOD; it and each of `--seeds` is a process of `swat_jax.main`, `--jobs` of them
at a time, in the order in which they are named. Rows that are done are not run again, and one that
was cut off goes on from its last checkpoint, also on another machine: `--pack` writes all that is
needed for that into a few files, `--unpack` takes it from there.

Every run that ends leaves a JSON file in `--output`, of which `python -m swat_jax.report` makes
tables and pictures, and a sparse one its weights in `RUNS/weights` (see `pruned_weights.py`).
Exit code: 0 all rows are done, 1 a row failed, 3 time was up before all were done.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import parts

HERE = pathlib.Path(__file__).parent
# What a run that is told to end is given to do so.
GRACE_SECONDS = 15.0
# Of result.json: what is not said of the run as a whole.
NOT_KEPT = ("num_classes", "image_shape")


class Row(NamedTuple):
    """A run: a config's file without its ending, a method, a seed; a label if settings differ."""

    config: str
    method: str
    seed: int
    label: str = ""

    @property
    def name(self) -> str:
        """Of its folder and its files."""
        label = f"_{self.label}" if self.label else ""
        return f"{self.config}_{self.method}{label}_seed{self.seed}"


def command(row: Row, options: argparse.Namespace) -> list[str]:
    """What trains a row."""
    return [
        *(sys.executable, "-m", "swat_jax.main"),
        *("--config", f"configs/{row.config}.py:{row.method}"),
        *("--workdir", str(options.runs / row.name)),
        f"--config.data.source={'npz' if options.data.endswith('.npz') else 'tfds'}",
        f"--config.data.data_dir={options.data}",
        f"--config.seed={row.seed}",
        f"--config.checkpoint.every_epochs={options.checkpoint_epochs}",
        *(f"--config.{setting}" for setting in options.set),
    ]


class Running:
    """A row that is being trained."""

    def __init__(self, row: Row, options: argparse.Namespace) -> None:
        self.row = row
        self.started = time.monotonic()
        self.log = options.runs / f"{row.name}.log"
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        # A run goes on in the same log.
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command(row, options), stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def stop(self) -> None:
        """Ends it as Ctrl-C would; the same command goes on from the last checkpoint."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_lines(self) -> str:
        """What it said last."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


def run_all(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Trains all rows that are not done yet; the exit code."""
    options.runs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    waiting = [row for row in rows if not is_done(row, options)]
    running: list[Running] = []
    failed = 0
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < options.jobs:
                running.append(Running(waiting.pop(0), options))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                seconds = f"{time.monotonic() - one.started:.0f} s"
                if one.process.returncode == 0:
                    found = collect(one.row, options)
                    print(
                        f"{one.row.name}: {found['pruned_test_accuracy']:.2%}, {seconds}",
                        flush=True,
                    )
                else:
                    failed += 1
                    print(f"{one.row.name}: failed after {seconds}\n{one.last_lines()}", flush=True)
            time.sleep(options.poll_seconds)
    finally:
        for one in running:
            one.stop()
            print(f"{one.row.name}: cut off, goes on at the next start", flush=True)
    return 1 if failed else 3 if waiting or running else 0


def is_done(row: Row, options: argparse.Namespace) -> bool:
    """Whether the row has left its figures; those of a run that just had no time to are taken."""
    if (options.output / f"{row.name}.json").exists():
        return True
    if not (options.runs / row.name / "result.json").exists():
        return False
    collect(row, options)
    return True


def collect(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the JSON file of a run that is done, and its weights."""
    folder = options.runs / row.name
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        "date": datetime.date.today().isoformat(),
        "label": row.label,
        "settings": options.set,
        **{key: value for key, value in result.items() if key not in NOT_KEPT},
        "epochs": by_epoch(lines),
        "config": json.loads((folder / "config.json").read_text()),
    }
    found["config"]["data"]["data_dir"] = pathlib.Path(options.data).name
    if row.method != "dense" and options.weights:
        weights = options.runs / "weights" / f"{row.name}.npz"
        weights.parent.mkdir(exist_ok=True)
        keep = [sys.executable, str(HERE / "pruned_weights.py"), str(folder), str(weights)]
        subprocess.run(keep, check=True)
        found["weights_bytes"] = weights.stat().st_size
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{row.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def pack(options: argparse.Namespace) -> list[pathlib.Path]:
    """Writes the figures of runs that are done, and whole runs that are not, as parts."""
    files: dict[str, pathlib.Path] = {
        f"results/{path.name}": path for path in sorted(options.output.glob("*.json"))
    }
    for path in sorted(options.runs.rglob("*")):
        name = path.relative_to(options.runs)
        is_done = f"results/{name.parts[0]}.json" in files
        if path.is_file() and not is_done:
            files[f"runs/{name.as_posix()}"] = path
    return parts.pack(files, options.pack)


def unpack(options: argparse.Namespace) -> None:
    """Puts what `pack` wrote back in its place; figures that are there stay."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        parts.unpack(options.unpack, folder)
        for path in sorted(folder.rglob("*")):
            first, *rest = path.relative_to(folder).parts
            to = (options.output if first == "results" else options.runs).joinpath(*rest)
            if path.is_file() and not (first == "results" and to.exists()):
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)


def by_epoch(lines: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Scores of every epoch that has some, beside the mean loss and accuracy of its steps."""
    epochs, train = [], []
    for line in lines:
        if line["kind"] == "train":
            train.append(line)
        elif line["kind"] == "eval":
            epochs.append({
                "step": line["step"],
                "train_loss": statistics.fmean(one["loss"] for one in train),
                "train_accuracy": statistics.fmean(one["accuracy"] for one in train),
                **{key: line[key] for key in ("test_loss", "test_accuracy", "activation_sparsity")},
            })  # fmt: skip
            train = []
    return epochs


def main() -> int:
    parser = argparse.ArgumentParser(description="Rows of the paper's tables, at full length.")
    parser.add_argument("--rows", nargs="+", default=[], metavar="CONFIG:METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", help="a TFDS directory with CIFAR-10, or an .npz file")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    output = pathlib.Path("docs/results/cifar10")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="for the JSON files")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--seconds", type=float, help="stop after as many, to go on later")
    parser.add_argument("--checkpoint_epochs", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--label", default="", help="of runs with --set, part of their names")
    parser.add_argument("--no_weights", dest="weights", action="store_false")
    parser.add_argument("--poll_seconds", type=float, default=0.5, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--unpack", type=pathlib.Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.unpack:
        unpack(options)
    rows = [
        Row(*name.split(":", 1), seed=seed, label=options.label)
        for seed in options.seeds
        for name in options.rows
        if ":" in name or parser.error(f"--rows must be CONFIG:METHOD, got {name}")
    ]
    if bool(options.set) != bool(options.label):
        parser.error("--set and --label belong together: what differs from a row is not that row")
    if rows and not options.data:
        parser.error("--rows needs --data, a TFDS directory with CIFAR-10 or an .npz file")
    if not (rows or options.pack or options.unpack):
        parser.error("give --rows, --pack or --unpack")
    try:
        code = run_all(rows, options) if rows else 0
    finally:
        if options.pack:
            print(*pack(options), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
