"""What the text of a compiled program says of its instructions: their kind, and bytes of our ops.

Bytes of a custom call of ours are those that it has to move: every operand is read once and every
result written once, whatever the kernels do. That is how `benchmarks/ops.py` counts too, but for
what an op reads a second time. Two things are left out:

* Scratch. It is a result like any other, but nobody takes it out of the tuple of results, so a
  result that no instruction reads counts nothing.
* The tensors of stored thresholds (of a `threshold` or `thresholds` whose flags, which say whether
  they are made anew, are no constant) in a step that reuses them: the kernel does not read them. If
  some thresholds of a `thresholds` are new in every step, their tensors are left out, too.

Room for packed values counts as full, which it nearly is: 5 % are spare.
"""

from __future__ import annotations

import dataclasses
import math
import re

OURS = "swat_jax_"
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAMED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_PARTS = {
    "convolution": "convolutions",
    "dot": "matrix products",
    "sort": "sorts",
}
# By how the targets of XLA's own custom calls begin.
_TARGETS = {
    "__cudnn$conv": "convolutions",
    "__onednn$conv": "convolutions",
    "__cublas": "matrix products",
    "__onednn$matmul": "matrix products",
    "__cub$": "sorts",
}


@dataclasses.dataclass
class Instruction:
    """One line of a program.

    Attributes:
      opcode: such as "fusion".
      results: bytes of each result; one where it is no tuple.
      operands: names.
      computation: what it is part of.
      rest: what follows the operands.
    """

    opcode: str
    results: list[int]
    operands: list[str]
    computation: str
    rest: str

    def attribute(self, name: str) -> str:
        """The value of an attribute without quotes, "" if there is none."""
        found = re.search(rf'\b{name}="?%?([^",\s]*)', self.rest)
        return found[1] if found else ""


class Program:
    """The instructions of a compiled program by name.

    Args:
      text: from `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.instructions: dict[str, Instruction] = {}
        self._readers: dict[str, list[str]] = {}
        computation = ""
        for line in text.splitlines():
            named = _NAMED.match(line)
            if named is None:
                header = _COMPUTATION.match(line)
                computation = header[1] if header else computation
                continue
            found = _read(line[named.end() :], computation)
            if found is None:
                continue
            self.instructions[named[1]] = found
            # The last instruction of a computation is read by who calls that.
            is_root = line.lstrip().startswith("ROOT ")
            self._readers.setdefault(named[1], []).extend(["the caller"] if is_root else [])
            for operand in found.operands:
                self._readers.setdefault(operand, []).append(named[1])
        head = re.match(r"HloModule ([\w.\-]+)", text)
        self.name = head[1] if head else ""

    def kind(self, name: str) -> str:
        """What an instruction counts as: one of our ops by its name, or a kind of XLA's."""
        found = self.instructions.get(name)
        if found is None:
            return "not in the program"
        if found.opcode == "custom-call":
            target = found.attribute("custom_call_target")
            if target.startswith(OURS):
                return target.removeprefix(OURS)
            kinds = (kind for begin, kind in _TARGETS.items() if target.startswith(begin))
            return next(kinds, "XLA's custom calls")
        if found.opcode == "fusion":
            calls = found.attribute("calls")
            inside = {one.opcode for one in self.instructions.values() if one.computation == calls}
            kinds = (kind for opcode, kind in _PARTS.items() if opcode in inside)
            copying = {"parameter", "copy", "bitcast", "tuple", "transpose"}
            only_copies = bool(inside) and inside <= copying
            return next(kinds, "copies" if only_copies else "XLA's fusions")
        if found.opcode.startswith("copy"):
            return "copies"
        # What XLA left alone is a kernel of the same sort as a fusion.
        return _PARTS.get(found.opcode, "XLA's fusions")

    def is_ours(self, name: str) -> bool:
        """Whether an instruction is a call of one of our kernels."""
        found = self.instructions.get(name)
        return found is not None and found.attribute("custom_call_target").startswith(OURS)

    def moved_bytes(self, name: str, *, refresh: bool) -> int:
        """Bytes that a custom call of ours has to move, see above.

        Args:
          name: of the instruction.
          refresh: whether the step recomputes stored thresholds.
        """
        call = self.instructions[name]
        flags = {"threshold": 2, "thresholds": 1}.get(self.kind(name))
        is_state = flags is not None and not self._is_constant(call.operands[flags])
        if is_state and not refresh:
            return sum(self._results(name, call))
        return sum(map(self._bytes, call.operands)) + sum(self._results(name, call))

    def _is_constant(self, name: str) -> bool:
        """Whether a value is the same in every step: a constant, or a copy or broadcast of one."""
        while (found := self.instructions.get(name)) is not None:
            if found.opcode == "constant":
                return True
            if found.opcode not in ("copy", "bitcast", "broadcast", "reshape"):
                return False
            name = found.operands[0]
        return False

    def _results(self, name: str, call: Instruction) -> list[int]:
        """Bytes of the results that somebody reads."""
        taken = set()
        for reader in self._readers[name]:
            found = self.instructions.get(reader)
            if found is None or found.opcode != "get-tuple-element":
                return call.results
            if self._readers[reader]:
                taken.add(int(found.attribute("index")))
        return [size for index, size in enumerate(call.results) if index in taken]

    def _bytes(self, name: str) -> int:
        return sum(self.instructions[name].results) if name in self.instructions else 0


def _read(text: str, computation: str) -> Instruction | None:
    """What stands behind the equals sign: shape, opcode, operands, attributes."""
    end = _closing(text) if text.startswith("(") else text.find(" ")
    shape, text = text[:end], text[end:].strip()
    opcode, bracket, _ = text.partition("(")
    if not bracket:
        return None
    text = text[len(opcode) :]
    end = _closing(text)
    operands = [part.split()[-1].lstrip("%") for part in _split(text[1 : end - 1])]
    sizes = [_size(*array) for array in _ARRAY.findall(shape)]
    return Instruction(opcode, sizes, operands, computation, text[end:])


def _size(dtype: str, dimensions: str) -> int:
    """Bytes of an array; "pred" is a byte, "token" nothing."""
    digits = re.search(r"\d+", dtype)
    bits = 0 if dtype == "token" else int(digits[0]) if digits else 8
    return -(-bits * math.prod(int(one) for one in dimensions.split(",") if one) // 8)


def _closing(text: str) -> int:
    """Where the bracket that the text begins with has ended."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return place + 1
    return len(text)


def _split(text: str) -> list[str]:
    """The parts between commas that are in no bracket, without comments."""
    parts, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
