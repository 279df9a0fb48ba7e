"""Sweeps over all convs of the six networks as a page, and a summary of it for another page.

They are made of those of `docs/results/sparse_conv_sweep_{op}_h200.json` that are there, which
`benchmarks/sparse_conv.py --all` writes; `benchmarks/sparse_conv_page.py` writes the page.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import results

PAGE = "sparse_convolutions_sweep.md"
HEADING = "Every conv of six networks"
# The sparsity at which milliseconds are shown.
SHOWN = 0.9
INTRODUCTION = results.ROOT / "benchmarks/texts/sparse_conv_sweep_page.md"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rival:
    """What cuDNN does instead.

    Attributes:
      key: its time in a row is `{key}_ms`.
      short: a column's heading.
      name: in a sentence.
    """

    key: str
    short: str
    name: str

    def ratio(self, row: Row) -> float:
        """How many times as fast as it the kernel is."""
        return row[f"{self.key}_ms"] / row["sparse_ms"]


@dataclasses.dataclass(frozen=True)
class Op:
    """What is swept.

    Attributes:
      key: of `benchmarks/sparse_conv.py --op`.
      dtype: what the page is about.
      title: of its part of the page.
      rivals: what it is compared with, all of it in the same run.
      tensor_cores: which of them computes with dense operands on tensor cores.
    """

    key: str
    dtype: str
    title: str
    rivals: tuple[Rival, Rival]
    tensor_cores: Rival

    @property
    def name(self) -> str:
        """In a table."""
        return f"{self.key.replace('_', ' ')}, {self.dtype}"


DENSE = Rival("dense", "cuDNN", "cuDNN from dense activations")
UNPACK = Rival("unpack", "unpack", "unpacking and cuDNN")
FLOAT32 = Rival("dense", "cuDNN", "cuDNN in true float32")
TF32 = Rival("tf32", "TF32", "cuDNN with TensorFloat-32")
OPS = (
    Op(
        "weight_gradient", "bfloat16", "The weight gradient from packed activations",
        (DENSE, UNPACK), DENSE,
    ),
    Op("forward", "float32", "Forward with single weights", (FLOAT32, TF32), TF32),
    Op(
        "input_gradient", "float32", "The input's gradient with single weights",
        (FLOAT32, TF32), TF32,
    ),
)  # fmt: skip


class Sweep:
    """What was found for an op.

    Attributes:
      op: which.
      found: the contents of its file.
      sparsities: in their order.
      networks: of which there are convs, in the order of `results.NAMES`.
    """

    def __init__(self, op: Op, found: Mapping[str, Any]) -> None:
        self.op, self.found = op, found
        self.sparsities: list[float] = sorted({row["sparsity"] for row in found["convs"]})
        named = {row["network"] for row in (*found["convs"], *found["refused"], *found["failed"])}
        self.networks = [name for name in map(_key, results.NAMES) if name in named]

    def convs(self, network: str | None = None) -> list[dict[float, Row]]:
        """For each conv, of all networks or of one, its row by sparsity."""
        by_conv: dict[tuple[str, str], dict[float, Row]] = {}
        for row in self.found["convs"]:
            if network in (None, row["network"]):
                conv = by_conv.setdefault((row["network"], row["name"]), {})
                conv[row["sparsity"]] = row
        return list(by_conv.values())

    def wins(self, rival: Rival, sparsity: float, network: str | None = None) -> int:
        """In how many convs the kernel is faster."""
        return sum(rival.ratio(conv[sparsity]) > 1 for conv in self.convs(network))

    def losses(self, rival: Rival, sparsity: float, network: str | None = None) -> int:
        """In how many convs it is slower."""
        return sum(rival.ratio(conv[sparsity]) < 1 for conv in self.convs(network))

    def others(self, kind: str, why: str, network: str) -> dict[str, list[str]]:
        """Convs of a network without figures, by the reason."""
        found: dict[str, list[str]] = {}
        for row in self.found[kind]:
            if row["network"] == network:
                found.setdefault(row[why], []).append(row["name"])
        return found


def sweeps() -> list[Sweep]:
    """Those of which there is a file with figures.

    Raises:
      SystemExit: a file is of another op or type, or lacks what is shown.
    """
    sweeps = []
    for op in OPS:
        name = f"sparse_conv_sweep_{op.key}_h200"
        if not (results.RESULTS / f"{name}.json").exists():
            continue
        found = results.read(name)
        if (found["op"], found["dtype"]) != (op.key, op.dtype):
            sys.exit(f"{name}.json is of {found['op']} in {found['dtype']}, not {op.name}")
        if not found["convs"]:
            continue
        sweep = Sweep(op, found)
        if SHOWN not in sweep.sparsities:
            sys.exit(f"{name}.json has nothing at a sparsity of {SHOWN}")
        sweeps.append(sweep)
    return sweeps


def summary() -> list[str]:
    """In how many convs the kernels are faster, and a link to the page; nothing if it is empty."""
    found = sweeps()
    if not found:
        return []
    sparsities = sorted(set().union(*(sweep.sparsities for sweep in found)))
    lines = [
        f"## {HEADING}",
        "",
        f"In how many convs the kernels are faster, of all of the six networks; [each]({PAGE}).",
        "",
        results.line_of("product", "faster than", "of", *(f"{one:.0%}" for one in sparsities)),
        f"|---|---|---:|{'---:|' * len(sparsities)}",
    ]
    for sweep in found:
        for rival in sweep.op.rivals:
            wins = [sweep.wins(rival, one) if one in sweep.sparsities else "" for one in sparsities]
            lines.append(results.line_of(sweep.op.name, rival.name, len(sweep.convs()), *wins))
    for sweep in found:
        lines += ["", sentence(sweep)]
    return lines


def page() -> str:
    """The tables; nothing if there are none."""
    found = sweeps()
    if not found:
        return ""
    lines = [
        f"# {HEADING}",
        "",
        INTRODUCTION.read_text(encoding="utf-8").strip(),
    ]
    for sweep in found:
        lines += ["", *part(sweep)]
    return "\n".join(lines) + "\n"


def sentence(sweep: Sweep) -> str:
    """Who wins in how many convs."""
    first, second = sweep.op.rivals
    count, (least, most) = len(sweep.convs()), (sweep.sparsities[0], sweep.sparsities[-1])
    dense = sweep.op.tensor_cores
    where = ", ".join(
        f"{sweep.losses(dense, SHOWN, one)} of {len(sweep.convs(one))} of {_name(one)}"
        for one in sweep.networks
        if sweep.convs(one)
    )
    text = (
        f"{sweep.op.name.capitalize()}: the kernels are faster than {first.name} "
        f"in {sweep.wins(first, SHOWN)} of {count} convs at {SHOWN:.0%} zeros, in "
        f"{sweep.wins(first, least)} at {least:.0%} and in {sweep.wins(first, most)} at "
        f"{most:.0%}; than {second.name} in {sweep.wins(second, SHOWN)}, "
        f"{sweep.wins(second, least)} and {sweep.wins(second, most)}. "
        f"Dense tensor cores ({dense.name}) win in {sweep.losses(dense, SHOWN)} at {SHOWN:.0%} "
        f"({where}), and in {sweep.losses(dense, most)} at {most:.0%}."
    )
    others = {
        "not taken": len(sweep.found["refused"]),
        "not measured, since it failed": len(sweep.found["failed"]),
        "still to measure": sweep.found["left"],
    }
    told = [f" Convs that are {what}: {number}." for what, number in others.items() if number]
    return text + "".join(told)


def part(sweep: Sweep) -> Iterator[str]:
    """The part of an op: a sentence, and a table for every network."""
    found, (first, second) = sweep.found, sweep.op.rivals
    yield from (f"## {sweep.op.title}", "")
    yield (
        f"{results.short_name(found['device'])}, jax {found['versions']['jax']}, {found['date']}; "
        f"{found['dtype']}; copies at {found['copy_gb_per_s'] / 1e3:.1f} TB/s. `cuDNN` is "
        f"{first.name.removeprefix('cuDNN ')}, `{second.short}` {second.name}. Ratios are to "
        f"`cuDNN`, in brackets to `{second.short}`."
    )
    yield from ("", sentence(sweep))
    for network in sweep.networks:
        yield from ("", f"### {sweep.op.title}: {_name(network)}", "")
        yield from table(sweep, network)
        for kind, why, told in (("refused", "reason", "Not taken"), ("failed", "error", "Failed")):
            for reason, names in sweep.others(kind, why, network).items():
                yield from ("", f"{told}: {', '.join(names)}: {reason}.")


def table(sweep: Sweep, network: str) -> Iterator[str]:
    """A row for each conv that was measured."""
    convs, rivals = sweep.convs(network), sweep.op.rivals
    if not convs:
        return
    wins = " and ".join(
        f"{sweep.wins(rival, SHOWN, network)} of {len(convs)} than {rival.name}" for rival in rivals
    )
    yield from (f"Faster at {SHOWN:.0%}: {wins}.", "")
    times = [*(rival.short for rival in rivals), "here", "floor"]
    columns = ("conv", "layers", *times, *(f"{one:.0%}" for one in sweep.sparsities))
    yield from (results.line_of(*columns), f"|---|{'---:|' * (len(columns) - 1)}")
    keys = [*(rival.key for rival in rivals), "sparse", "floor"]
    for conv in convs:
        row = conv[SHOWN]
        ratios = (cell(rivals, conv[sparsity]) for sparsity in sweep.sparsities)
        shown = [f"{row[f'{key}_ms']:.3f}" for key in keys]
        shown[-1] += f" {row['floor_is'][0]}"
        yield results.line_of(row["name"], row["layers"], *shown, *ratios)


def cell(rivals: Sequence[Rival], row: Row) -> str:
    """Both ratios, in bold where the kernel is faster."""
    ratios = [rival.ratio(row) for rival in rivals]
    first, second = (f"**{one:.2f}**" if one > 1 else f"{one:.2f}" for one in ratios)
    return f"{first} ({second})"


def _key(name: str) -> str:
    """Configs of CIFAR-10 say so in their names, networks do not."""
    return name.removeprefix("cifar10_")


def _name(network: str) -> str:
    return {_key(name): shown for name, shown in results.NAMES.items()}[network]
