r"""Trains rows of the paper's tables at full length and keeps what came out.

    python benchmarks/reproduce.py --data DATA --runs runs --jobs 2 \
        --rows cifar10_resnet18:channel70 cifar10_resnet18:dense cifar10_vgg16:u90
    python benchmarks/reproduce.py --runs runs --pack parts
    python benchmarks/reproduce.py --runs runs --unpack parts

A row is CONFIG:METHOD; it and each of `--seeds` is a process of `swat_jax.main`, `--jobs` of them
at a time, in the order in which they are named, each on one of the GPUs that `--devices` names.
Rows that are done are not run again, and one that was cut off goes on from its last checkpoint,
also on another machine: `--pack` writes all that is needed for that into a few files, `--unpack`
takes it from there.

A row's `gpu_seconds` are all the time from the start of its processes to their end, imports and
compilation included, of one GPU; of one that several rows share at that moment, each has an equal
part. Not counted are rows of another `reproduce.py`, and those that go on after this was killed.

Every run that ends leaves a JSON file in `--output`, of which `python -m swat_jax.report` makes
tables and pictures, and a sparse one its weights in `RUNS/weights` (see `swat_jax.export`).
Exit code: 0 all rows are done, 1 a row failed, 3 time was up before all were done.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import fcntl
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
from concurrent.futures import Future
from typing import Any, NamedTuple

import parts

from swat_jax.checkpoint import complete_steps
from swat_jax.files import replace_text

# What a run that is told to end is given to do so.
GRACE_SECONDS = 15.0
# In a run's folder, so that it goes where the run goes.
GPU_SECONDS = "gpu_seconds.txt"
XLA_FLAGS = "xla_flags.txt"
# Of result.json: what is not said of the run as a whole.
NOT_KEPT = ("num_classes", "image_shape", "class_names")


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
    """A row that is being trained.

    Raises:
      RowError: another process trains it, or it was begun with other settings.
    """

    def __init__(self, row: Row, device: str | None, options: argparse.Namespace) -> None:
        self.row, self.device = row, device
        self.started = time.monotonic()
        self.counted = self.started
        self._runs = options.runs
        self.log = options.runs / f"{row.name}.log"
        check_settings(row, options)
        # The child holds the lock too, so that it outlives this process with it.
        self._lock = (options.runs / f"{row.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RowError("another process trains it") from None
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        keep_flags(options.runs, row, environment.get("XLA_FLAGS", ""))
        # A run goes on in the same log. A session of its own: Ctrl-C reaches it through `stop`.
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command(row, options),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )

    def count(self, now: float, sharing: int) -> None:
        """Adds the time since it was last counted, of which so many rows on its GPU had a part."""
        part = (now - self.counted) / sharing
        self.counted = now
        add_gpu_seconds(self._runs, self.row, part)

    def end(self) -> None:
        """After the process has ended."""
        self._lock.close()

    def last_lines(self) -> str:
        """What it said last."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


def gpu_seconds(runs: pathlib.Path, row: Row) -> float | None:
    """What a row has had of a GPU so far, in all its starts; None where it was not counted."""
    file = runs / row.name / GPU_SECONDS
    return float(file.read_text()) if file.exists() else None


def add_gpu_seconds(runs: pathlib.Path, row: Row, seconds: float) -> None:
    """Counts seconds of a GPU to a row."""
    total = (gpu_seconds(runs, row) or 0.0) + seconds
    (runs / row.name).mkdir(exist_ok=True)
    replace_text(runs / row.name / GPU_SECONDS, f"{total:.3f}\n")


def keep_flags(runs: pathlib.Path, row: Row, flags: str) -> None:
    """Remembers XLA's flags of a run; of one that was begun with others, all of them."""
    file = runs / row.name / XLA_FLAGS
    file.parent.mkdir(exist_ok=True)
    before = file.read_text().splitlines() if file.exists() else []
    if flags not in before:
        replace_text(file, "".join(f"{one}\n" for one in (*before, flags)))


def xla_flags(runs: pathlib.Path, row: Row) -> str | None:
    """Those that a run had; of several starts one after the other. None where it is not known."""
    file = runs / row.name / XLA_FLAGS
    if not file.exists():
        return None
    given = file.read_text().splitlines()
    return given[0] if len(given) == 1 else ", then ".join(one or "none" for one in given)


class RowError(Exception):
    """Why a row cannot be trained, or its figures not be taken."""


def free_device(running: Sequence[Running], options: argparse.Namespace) -> str | None:
    """The GPU with the fewest rows; None where the environment says which."""
    used = [one.device for one in running]
    return min(options.devices, key=used.count, default=None)


def count(running: Sequence[Running]) -> None:
    """Counts the time since the last count to runs, equal parts of a GPU to those that share it."""
    now, used = time.monotonic(), [one.device for one in running]
    for one in running:
        one.count(now, used.count(one.device))


def stop(running: Sequence[Running]) -> None:
    """Ends runs. A run that is killed at any moment goes on from its last checkpoint."""
    for one in running:
        one.process.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for one in running:
        try:
            one.process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.end()
    count(running)


def check_settings(row: Row, options: argparse.Namespace) -> None:
    """Remembers with which settings a row is trained, and refuses others under its name."""
    file = options.runs / f"{row.name}.settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != options.set:
        raise RowError(f"it was begun with --set {' '.join(before)}; give another --label")
    replace_text(file, json.dumps(options.set))


def run_all(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Trains all rows that are not done yet; the exit code."""
    options.runs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    waiting, running, failed = list(dict.fromkeys(rows)), list[Running](), 0
    collector, taken = concurrent.futures.ThreadPoolExecutor(1), list[Future[bool]]()
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < options.jobs:
                row = waiting.pop(0)
                try:
                    if not is_done(row, options):
                        running.append(Running(row, free_device(running, options), options))
                except RowError as error:
                    failed += 1
                    print(f"{row.name}: failed: {error}", flush=True)
            ended = [one for one in running if one.process.poll() is not None]
            count(running)
            for one in ended:
                running.remove(one)
                one.end()
                # Beside the loop: what it takes is not to be counted to those that still run.
                taken.append(collector.submit(take, one, options))
            time.sleep(options.poll_seconds)
    finally:
        stop(running)
        for one in running:
            print(f"{one.row.name}: cut off, goes on at the next start", flush=True)
        collector.shutdown()
    failed += sum(not one.result() for one in taken)
    return 1 if failed else 3 if waiting or running else 0


def take(one: Running, options: argparse.Namespace) -> bool:
    """Collects what a run has left that has ended; whether there was anything, which it says."""
    seconds = f"{one.counted - one.started:.0f} s"
    try:
        if one.process.returncode != 0:
            raise RowError(one.last_lines())
        accuracy = collect(one.row, options)["pruned_test_accuracy"]
    except RowError as error:
        print(f"{one.row.name}: failed after {seconds}: {error}", flush=True)
        return False
    print(f"{one.row.name}: {accuracy:.2%}, {seconds}", flush=True)
    return True


def is_done(row: Row, options: argparse.Namespace) -> bool:
    """Whether the row has left its figures; those of a run that just had no time to are taken."""
    if (options.output / f"{row.name}.json").exists():
        return True
    if not (options.runs / row.name / "result.json").exists():
        return False
    collect(row, options)
    return True


def collect(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the JSON file of a run that is done, and its weights.

    Raises:
      RowError: the run did not end as it should.
    """
    folder = options.runs / row.name
    check_settings(row, options)
    try:
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RowError(f"its figures cannot be read: {error}") from error
    if not row.label and config["max_steps"] is not None:
        raise RowError(f"it ended after {config['max_steps']} steps, and has no --label")
    found = {
        "date": datetime.date.today().isoformat(),
        "label": row.label,
        "settings": options.set,
        "gpu_seconds": gpu_seconds(options.runs, row),
        "xla_flags": xla_flags(options.runs, row),
        **{key: value for key, value in result.items() if key not in NOT_KEPT},
        "epochs": by_epoch(lines),
        "config": config,
    }
    found["config"]["data"]["data_dir"] = pathlib.Path(options.data).name
    if row.method != "dense" and options.weights:
        weights = options.runs / "weights" / f"{row.name}.safetensors"
        weights.parent.mkdir(exist_ok=True)
        keep = [sys.executable, "-m", "swat_jax.export", str(folder), str(weights)]
        keep += ["--most_mib", str(parts.MOST_BYTES / 2**20)]
        # Other rows have the GPU.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        told = subprocess.run(keep, env=environment, capture_output=True, text=True, check=False)
        if told.returncode != 0:
            raise RowError(f"its weights cannot be kept: {told.stderr[-500:]}")
        found["weights"] = told.stdout.strip().split(": ", 1)[1]
    options.output.mkdir(parents=True, exist_ok=True)
    replace_text(options.output / f"{row.name}.json", json.dumps(found, indent=1) + "\n")
    return found


def pack(options: argparse.Namespace) -> list[pathlib.Path]:
    """Writes the figures of runs that are done, and whole runs that are not, as parts."""
    files: dict[str, pathlib.Path] = {
        f"results/{path.name}": path for path in sorted(options.output.glob("*.json"))
    }
    for path in sorted(options.runs.rglob("*")):
        name = path.relative_to(options.runs)
        has_figures = f"results/{name.parts[0]}.json" in files
        if path.is_file() and not has_figures and path.suffix != ".lock":
            files[f"runs/{name.as_posix()}"] = path
    return parts.pack(files, options.pack)


def unpack(options: argparse.Namespace) -> None:
    """Puts what `pack` wrote back in its place.

    What is there stays, but for runs that have come further in the parts: those are replaced whole.
    """
    options.runs.mkdir(parents=True, exist_ok=True)
    # Beside the runs, so that folders can be moved.
    with tempfile.TemporaryDirectory(dir=options.runs, prefix=".unpacked-") as place:
        folder = pathlib.Path(place)
        parts.unpack(options.unpack, folder)
        for path in sorted((folder / "results").glob("*.json")):
            if not (to := options.output / path.name).exists():
                options.output.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
        for path in sorted((folder / "runs").glob("*")):
            to = options.runs / path.name
            if path.is_dir() and to.exists():
                if newest(to) >= newest(path):
                    continue
                to.replace(folder / f"old-{path.name}")
            if not to.exists():
                path.replace(to)


def newest(run: pathlib.Path) -> int:
    """The step of a run's newest complete checkpoint; 0 if it has none."""
    return max(complete_steps(run / "checkpoints"), default=0)


def by_epoch(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of every epoch that has some, beside the mean loss and accuracy of its steps."""
    epochs, train = [], []
    for line in lines:
        if line["kind"] == "train":
            train.append(line)
        elif line["kind"] == "eval":
            mean = {
                key: statistics.fmean(one[key] for one in train) if train else None
                for key in ("loss", "accuracy")
            }
            epochs.append({
                "step": line["step"],
                "train_loss": mean["loss"],
                "train_accuracy": mean["accuracy"],
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
    devices = (
        "GPUs to spread rows over, one each, by their numbers; default: as the environment says"
    )
    parser.add_argument("--devices", nargs="+", default=[], metavar="GPU", help=devices)
    parser.add_argument("--seconds", type=float, help="stop after as many, to go on later")
    parser.add_argument("--checkpoint_epochs", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--label", default="", help="of runs with --set, part of their names")
    parser.add_argument("--no_weights", dest="weights", action="store_false")
    parser.add_argument("--poll_seconds", type=float, default=0.5, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--unpack", type=pathlib.Path, metavar="FOLDER")
    options = parser.parse_args()
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
    # Whoever ends this ends the runs too, and what they have is packed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.unpack:
        unpack(options)
    try:
        code = run_all(rows, options) if rows else 0
    finally:
        if options.pack:
            print(*pack(options), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
