"""The networks in pretrained/: the best run of each, its values rounded where that costs nothing.

    python benchmarks/pretrained.py --data cifar10.npz runs/*.safetensors
    python benchmarks/pretrained.py                # the table alone, of the files that are there
    python benchmarks/pretrained.py --check        # only says whether it is up to date

Arguments are files of `python -m swat_jax.export`. Of each network that one is taken whose run had
the best hard-pruned accuracy, of those that were trained with `LEAST_SPARSITY` of zeros or more,
unless pretrained/ has a better one. It is scored on all test images, in float32, as it is and with
values in bfloat16, which are written where they cost no more than `MOST_LOST`. What was found is in
the file (`scored`); the table in pretrained/README.md is made of that and of docs/results.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import marked
import results

from swat_jax import config_file, evaluate, sparse_file
from swat_jax.errors import UsageError

FOLDER = results.ROOT / "pretrained"
BEGIN = "<!-- benchmarks/pretrained.py writes from here -->\n"
LEAST_SPARSITY = 0.9
# In accuracy: 3 of 10,000 images, a seventh of the standard error of an accuracy of 95 %.
MOST_LOST = 3e-4
MOST_MIB = 25
# What labels mean; a run whose images came from an .npz file knows their numbers only.
CLASSES = {
    "cifar10": [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ],
}
# Of a run's figures and of a file's facts: what says that they are of the same training.
SAME = ("network", "method", "seed", "steps", "pruned_test_accuracy")


class Network(NamedTuple):
    """A file and what it says of itself."""

    path: pathlib.Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.facts['dataset']}_{self.facts['network']}"


def read(path: pathlib.Path) -> Network:
    return Network(path, sparse_file.read(path).facts)


def present() -> list[Network]:
    """The networks that are there, by name."""
    return [read(path) for path in sorted(FOLDER.glob("*.safetensors"))]


def choose(candidates: Sequence[Network], held: Sequence[Network]) -> list[Network]:
    """Those that are to be taken: of each network the best, if it is better than what is there."""
    best = {one.name: one for one in held}
    for one in candidates:
        if one.facts["config"]["sparsity"]["weight"] < LEAST_SPARSITY:
            print(f"{one.path}: not sparse enough")
        elif one.name not in best or accuracy_of_run(one) > accuracy_of_run(best[one.name]):
            best[one.name] = one
    return [one for one in best.values() if one not in held]


def accuracy_of_run(network: Network) -> float:
    return network.facts["pruned_test_accuracy"]


def score(path: pathlib.Path, facts: dict[str, Any], data: str) -> float:
    """Accuracy on all test images, in float32."""
    file = results.ROOT / "configs" / f"{facts['dataset']}_{facts['network']}.py"
    config: Any = config_file.load(f"{file}:{facts['method']}")
    config.precision = "float32"
    config.devices = 1
    config.data.data_dir = data
    if data.endswith(".npz"):
        config.data.source = "npz"
    return evaluate.evaluate(path, config)["accuracy"]


def take(network: Network, data: str) -> None:
    """Writes a network to the folder in place of its predecessor, in bfloat16 if as good so."""
    classes = CLASSES[network.facts["dataset"]]
    exact = score(network.path, network.facts, data)
    held = sparse_file.read(network.path)
    path = FOLDER / f"{network.name}_{network.facts['method']}.safetensors"

    def write(values: str, accuracy: float | None) -> None:
        scored = {"accuracy": accuracy, "before_rounding": exact, "values": values}
        facts = {**held.facts, "scored": scored, "class_names": classes}
        sparse_file.write(path, held.arrays, sparse=held.sparse, facts=facts, values=values)

    old = [one.path for one in present() if one.name == network.name]
    FOLDER.mkdir(exist_ok=True)
    write("bfloat16", None)
    rounded = score(path, network.facts, data)
    if rounded >= exact - MOST_LOST:
        write("bfloat16", rounded)
    else:
        write("float32", exact)
    for other in old:
        if other != path:
            other.unlink()
    print(f"{path.name}: {exact:.2%}, {rounded:.2%} with values in bfloat16")


def how_trained(network: Network) -> tuple[str, str]:
    """The recipe of a network, and the device and time of its run in docs/results."""
    facts, config = network.facts, network.facts["config"]
    recipe = f"{config['epochs']} epochs of batch {config['batch_size']}, seed {config['seed']}"
    for path in sorted((results.RESULTS / facts["dataset"]).glob("*.json")):
        run = results.read(f"{facts['dataset']}/{path.stem}")
        if all(run[key] == facts[key] for key in SAME):
            settings = "".join(f", `{setting}`" for setting in run["settings"])
            link = f"[{run['device']}](../docs/results/{facts['dataset']}/{path.name})"
            seconds = run["gpu_seconds"]
            return recipe + settings, link if seconds is None else f"{link}, {seconds:.0f} s"
    raise UsageError(f"{network.path}: docs/results has no run with its {', '.join(SAME)}")


def table(networks: Sequence[Network]) -> list[str]:
    """What there is, in Markdown."""
    lines = [
        "| file | zeros | top-1 | unrounded | of its run | values | MiB | trained | on |",
        "|---|---:|---:|---:|---:|---|---:|---|---|",
    ]
    total = 0
    for one in networks:
        size = one.path.stat().st_size
        total += size
        scored, (recipe, device) = one.facts["scored"], how_trained(one)
        cells = (
            *(f"[`{one.path.stem}`]({one.path.name})", f"{one.facts['weight_sparsity']:.1%}"),
            *(f"{100 * scored[key]:.2f}" for key in ("accuracy", "before_rounding")),
            f"{100 * accuracy_of_run(one):.2f}",
            *(scored["values"], f"{size / 2**20:.1f}", recipe, device),
        )
        lines.append(results.line_of(*cells))
    lines += ["", f"{total / 2**20:.1f} MiB in all."]
    if total > MOST_MIB * 2**20:
        raise UsageError(f"pretrained/ holds more than {MOST_MIB} MiB")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The networks in pretrained/.")
    parser.add_argument("weights", nargs="*", type=pathlib.Path, help="files to choose from")
    parser.add_argument("--data", help="CIFAR-10: an .npz file or a TFDS directory")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    if options.weights and (options.check or not options.data):
        parser.error("files to choose from need --data, and no --check")
    for one in choose([read(path) for path in options.weights], present()):
        take(one, options.data)
    stale = "pretrained/README.md is not up to date: run python benchmarks/pretrained.py"
    tables = {BEGIN: table(present())}
    return marked.update(FOLDER / "README.md", tables, check=options.check, stale=stale)


if __name__ == "__main__":
    sys.exit(main())
