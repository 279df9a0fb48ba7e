"""Training steps of whole networks: time and peak memory, sparse against dense.

    python benchmarks/steps.py --output docs/results/steps_h200.json
    python benchmarks/steps.py --networks imagenet_resnet50:256 --methods dense u90 --rounds 3
    python benchmarks/steps.py --merge some.json others.json --output all.json

`benchmarks/methods.py` says what is compared; `dense` is stock Flax. Every (network, method) is a
process of its own, on synthetic images that lie on the device, several batches of them in turn.
Several processes compile at once. When all of a group have done so they are timed one after the
other, dense first, and then again; all others wait meanwhile. Dense is in every group of its
network. It compiles before the others, so that XLA chooses its algorithms on an idle GPU; they
find its choices in a common cache.

The time of a step at period P is ``((P - 1) * reused + refreshed) / P``. Both are medians over
several stretches of steps, and the least of all rounds; ratios are to dense in the same group.
Steps that reuse thresholds are timed soon after a refresh: in a run of a long period thresholds
drift further, and more tensors are refreshed early.
At batches of at most 128 a hundred steps are dispatched at once on data that lie on the device,
with augmentation, as in training, and the time is their mean: the host could not dispatch single
ones as fast as they run.
Memory is told in four ways: what the allocator saw at most (`peak_mib`, without the batches that
wait), what XLA plans for arguments, results and everything between (`xla_mib`), of that what lives
inside a step (`temporary_mib`), and what layers keep for their backward passes (`kept_mib`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from methods import METHODS, OWN_MODEL
from worker import Worker, answer

NETWORKS = (
    "imagenet_resnet50:256",
    "imagenet_wrn50_2:256",
    "cifar10_wrn16_8:512",
    "cifar10_resnet18:512",
    "cifar10_vgg16:512",
    "cifar10_densenet121:512",
    "cifar10_wrn16_8:128",
    "cifar10_resnet18:128",
    "cifar10_vgg16:128",
    "cifar10_densenet121:128",
)
STRETCHES = 5
EVERY = METHODS | OWN_MODEL
# What was measured on other devices or versions is no table.
COMMON = ("device", "versions")


def measure(network: str, method: str, steps: int) -> None:
    """A member of a group: compiles, then times steps whenever a line says so.

    Imports JAX, which the parent must not.
    """
    import jax
    import training_step

    from swat_jax import kernels, native

    measured = training_step.make_method(network, EVERY[method])
    with training_step.apart(EVERY[method]):
        backend = kernels.backend()
    period = measured.period
    measured.milliseconds(2, refresh=True)
    name, batch = network.split(":")
    library = native.load().build_info if backend == "cuda" else {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    answer({
        "network": name,
        "batch": int(batch),
        "method": method,
        "threshold_every_steps": period,
        "steps_per_dispatch": measured.steps_per_dispatch,
        **({"algorithms": measured.notes} if measured.notes else {}),
        "backend": backend,
        "temporary_mib": measured.temporary_bytes / 2**20,
        "xla_mib": measured.xla_bytes / 2**20,
        "kept_mib": kept_mib(measured, method, backend),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "library": dict(library),
    })  # fmt: skip

    def median(*, refresh: bool) -> float:
        count = max(1, steps // STRETCHES)
        found = (measured.milliseconds(count, refresh=refresh) for _ in range(STRETCHES))
        return statistics.median(found)

    for _ in sys.stdin:
        measured.milliseconds(3, refresh=True)  # a device that was idle is slow at first
        measured.milliseconds(2)
        reused = median(refresh=False)
        # Whole periods that are dispatched at once hold the steps that refresh.
        apart = period > 1 and measured.steps_per_dispatch == 1
        refreshed = median(refresh=True) if apart else reused
        peak = measured.peak_bytes / 2**20
        answer({"reused_ms": reused, "refreshed_ms": refreshed, "peak_mib": peak})


def kept_mib(measured: Any, method: str, backend: str) -> float | None:
    """What waits for the backward pass by `swat_jax.kept_bytes`.

    None for what is not counted there: our batch norm without sparsity, blocks that are computed
    again, activations that are not packed.
    """
    from swat_jax import kept_bytes

    packs = backend == "cuda" and EVERY[method].name != "dense"
    if method != "dense" and not packs:
        return None
    info = measured.info
    kept = (kept_bytes.swat if packs else kept_bytes.dense)(
        measured.config,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        batch_size=measured.config.batch_size,
    )
    return sum(layer.activations + layer.weights for layer in kept) / 2**20


class Member(Worker):
    """A process that measures one method of a network, and works only when it is asked to.

    Args:
      network: as CONFIG:BATCH.
      method: of `EVERY`.
      options: the command line.
      folder: for what it prints, and for the cache of all.
    """

    def __init__(
        self, network: str, method: str, options: argparse.Namespace, folder: pathlib.Path
    ) -> None:
        self.network, self.method = network, method
        self.facts: dict[str, Any] = {}
        self.times: list[dict[str, Any]] = []
        environment = {
            **os.environ,
            # Memory that others of the group need; the peak is of this process either way.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": options.cache or str(folder / "cache"),
        }
        command = [sys.executable, __file__, "--one", "--networks", network, "--methods", method]
        command += ["--steps", str(options.steps)]
        log = folder / f"{network} {method}.log".replace(":", " ")
        super().__init__(f"{network} {method}", command, environment, log, options.timeout)

    def compiled(self) -> bool:
        """Waits until it has compiled; False where it failed."""
        self.facts = self.answer()
        return not self.error

    def time(self) -> None:
        """Lets it time its steps once, and waits."""
        if self.error:
            return
        self.ask("time")
        found = self.answer()
        if found:
            self.times.append(found)


def time_group(members: Sequence[Member], rounds: int) -> None:
    """Waits until all have compiled, then times one after the other, ``rounds`` times."""
    ready = [one for one in members if not one.error and (one.facts or one.compiled())]
    for _ in range(rounds):
        for member in ready:
            member.time()


def measure_network(network: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a network, and for what failed a row with "error" in place of figures.

    That of dense comes again with every group, which times it again.
    """
    others = [method for method in options.methods if method != "dense"]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(method: str) -> Member:
            member = Member(network, method, options, folder)
            stack.callback(member.close)
            return member

        dense = [start("dense")] if "dense" in options.methods else []
        for member in dense:
            member.compiled()
        width = max(1, options.jobs - len(dense))
        groups = [others[at : at + width] for at in range(0, len(others), width)] or [[]]
        for methods in groups:
            group = [start(method) for method in methods]
            before = [len(member.times) for member in dense]
            time_group([*dense, *group], options.rounds)
            base = None
            for member, first in zip(dense, before, strict=True):
                base = summary(member, member.times[first:])
                yield row(member, member.times, base)
            for member in group:
                member.close()
                yield row(member, member.times, base)


def summary(member: Member, times: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The round with the least time of a step, or None where there is none."""
    if member.error or not times:
        return None
    period = member.facts["threshold_every_steps"]
    rounds = [
        {**found, "ms": ((period - 1) * found["reused_ms"] + found["refreshed_ms"]) / period}
        for found in times
    ]
    peak = max(found["peak_mib"] for found in rounds)
    return {
        **min(rounds, key=lambda found: found["ms"]),
        "peak_mib": peak,
        "rounds_ms": [found["ms"] for found in rounds],
    }


def row(
    member: Member, times: Sequence[dict[str, Any]], dense: dict[str, Any] | None
) -> dict[str, Any]:
    """What was found of one member, beside dense in the same group."""
    found = summary(member, times)
    name, batch = member.network.split(":")
    names = {"network": name, "batch": int(batch), "method": member.method}
    if found is None:
        return {**names, "error": member.error or "never timed"}
    result = {
        **member.facts,
        **found,
        "images_per_second": int(batch) / found["ms"] * 1e3,
    }
    if dense is not None:
        base = found if member.method == "dense" else dense
        result |= {
            "dense_ms": base["ms"],
            "time_ratio": found["ms"] / base["ms"],
            "memory_ratio": found["peak_mib"] / max(base["peak_mib"], 1),
        }
    return result


def report(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The contents of the JSON file; device and versions are of all rows and said once."""
    good = [one for one in rows if "error" not in one]
    common = {key: good[0][key] for key in (*COMMON, "library")} if good else {}
    # Not every method has kernels to tell the version of.
    common["library"] = next((one["library"] for one in good if one["library"]), {})
    steps = [{key: one[key] for key in one if key not in common} for one in good]
    failed = [one for one in rows if "error" in one]
    return {"date": datetime.date.today().isoformat(), **common, "steps": steps, "failed": failed}


def merge(files: Sequence[str]) -> dict[str, Any]:
    """One report of several, in the order of `NETWORKS` and `EVERY`.

    A row of a later file replaces the same one of an earlier file. Rows of a network that were
    not dispatched alike are refused.
    """
    reports = [json.loads(pathlib.Path(file).read_text()) for file in files]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file, one in zip(files, reports, strict=True):
        for key in COMMON:
            if one.get(key) != reports[0].get(key):
                sys.exit(f"{file}: {key} is {one.get(key)}, in {files[0]} {reports[0].get(key)}")
        for found in (*one["failed"], *one["steps"]):
            rows[found["network"], found["batch"], found["method"]] = found
    dispatched: dict[tuple[Any, Any], Any] = {}
    for (network, batch, _), found in rows.items():
        if "error" not in found:
            steps = found.get("steps_per_dispatch", 1)
            if dispatched.setdefault((network, batch), steps) != steps:
                sys.exit(f"{network}, {batch}: not all have the same steps_per_dispatch")
    networks, methods = list(NETWORKS), list(EVERY)

    def place(row: tuple[Any, ...]) -> tuple[int, int]:
        network = f"{row[0]}:{row[1]}"
        known = network in networks
        return networks.index(network) if known else len(networks), methods.index(row[2])

    rows = {row: rows[row] for row in sorted(rows, key=place)}
    return {
        **reports[-1],
        "steps": [found for found in rows.values() if "error" not in found],
        "failed": [found for found in rows.values() if "error" in found],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'network':20} {'batch':>5} {'method':22} {'P':>5} {'ms':>8} {'x dense':>7} "
        f"{'MiB':>7} {'x dense':>7} {'XLA MiB':>7} {'kept':>7} {'reused':>8} {'refresh':>8}  rounds"
    )
    lines = [head]
    for one in rows:
        rounds = " ".join(f"{ms:.2f}" for ms in one["rounds_ms"])
        lines.append(
            f"{one['network']:20} {one['batch']:5} {one['method']:22} "
            f"{one['threshold_every_steps']:5} {one['ms']:8.2f} {one.get('time_ratio', 0):7.2f} "
            f"{one['peak_mib']:7.0f} {one.get('memory_ratio', 0):7.2f} {one['xla_mib']:7.0f} "
            f"{one['kept_mib'] or 0:7.0f} {one['reused_ms']:8.2f} {one['refreshed_ms']:8.2f}  "
            f"{rounds}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of training steps.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="CONFIG:BATCH ...")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=EVERY)
    parser.add_argument("--jobs", type=int, default=4, help="processes at once, dense included")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of each kind and round")
    parser.add_argument("--timeout", type=float, default=300, help="seconds without an answer")
    parser.add_argument("--cache", help="folder for compiled programs; by default one that goes")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="measure nothing, join reports")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.networks[0], options.methods[0], options.steps)
        return
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    found = merge(options.merge) if options.merge else report(())

    def write() -> None:
        if options.output:
            pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")

    for network in () if options.merge else options.networks:
        for one in measure_network(network, options):
            rows[network, one["method"]] = one
            found = report(list(rows.values()))
            write()  # at once: what takes long may be cut short
    write()
    print(table(found["steps"]))


if __name__ == "__main__":
    main()
