"""What of a program is computed in one pass with which batch norm, and for whom it packs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from swat_jax.dropout import Dropout
from swat_jax.fusion import patterns
from swat_jax.fusion.program import START, Program, Step
from swat_jax.layers import SwatConv, SwatLinear

_SWAT = (SwatConv, SwatLinear)
_DROPOUT = (nnx.Dropout, Dropout)


@dataclasses.dataclass
class Pass:
    """A batch norm and what is computed with it.

    Attributes:
      norm: position of its step.
      end: position of the last step that is part of it, where it is computed.
      value: number of its result.
      residual: number of what is added, or None.
      relu: whether there is a ReLU.
      dropout: position of the dropout that ends it, or None.
      why: why there is no ReLU, or empty.
    """

    norm: int
    end: int
    value: int
    residual: int | None = None
    relu: bool = False
    dropout: int | None = None
    why: str = ""


@dataclasses.dataclass
class Plan:
    """How a program is to be computed.

    Attributes:
      passes: by the position where they are computed.
      skipped: positions of steps that are part of a pass and need nothing of their own.
      left: position of a batch norm that stays as it is, though it need not if it were another
        one -> why.
      resting: position of a batch norm that stays as it is, since there is nothing to gain -> why.
      packing: number of a value -> positions of the SWAT layers that read it and are told how it
        was packed.
      pools: position of a max pooling -> its arguments, where winners are kept in place of values.
      constant_biases: positions of convs whose bias has no gradient.
    """

    passes: dict[int, Pass]
    skipped: set[int]
    left: dict[int, str]
    resting: dict[int, str]
    packing: dict[int, tuple[int, ...]]
    pools: dict[int, dict[str, Any]]
    constant_biases: set[int]


def make(program: Program) -> Plan:
    """Decides what is fused."""
    passes: dict[int, Pass] = {}
    left: dict[int, str] = {}
    resting: dict[int, str] = {}
    skipped: set[int] = set()
    # The last norm takes the residual: that of a shortcut is then made before it.
    for position, step in reversed(list(enumerate(program.steps))):
        if step.mark is None or step.mark.kind is not nnx.BatchNorm:
            continue
        found = _pass(program, position, skipped)
        if why := _is_left(program, step):
            left[position] = why
            continue
        if why := _rests(program, step, found):
            resting[position] = why
            continue
        if any(one.residual == found.value for one in passes.values()):
            found.why = ""  # a shortcut has no ReLU of its own
        passes[found.end] = found
        skipped |= {position, *_chain(program, found)} - {found.end}
    packing = _packing(program, passes)
    return Plan(
        passes=passes,
        skipped=skipped,
        left=left,
        resting=resting,
        packing=packing,
        pools=_pools(program, passes),
        constant_biases=_constant_biases(program, passes),
    )


def reads(program: Program, number: int, *, but: Sequence[int] = ()) -> tuple[str, ...]:
    """Who reads a value, by name, but for steps at these positions."""
    names = [
        program.steps[position].name
        for position, _ in program.readers[number]
        if position not in but
    ]
    if number in program.returned:
        names.append("the result of the function")
    return tuple(dict.fromkeys(names))


def _pass(program: Program, position: int, taken: set[int]) -> Pass:
    """The longest pass that begins with this batch norm."""
    step = program.steps[position]
    value = step.outputs[0]
    alone = Pass(position, position, value)
    alone.why = _no_relu(program, value)
    found = Pass(position, position, value)
    reader, place = _reader(program, value)
    if reader is not None and place not in taken:
        other = patterns.addend(program, reader, value)
        if other is not None:
            found.residual, found.value, found.end = other, reader.outputs[0], place
            reader, place = _reader(program, found.value)
    if reader is None or place in taken or not patterns.relu_of(program, reader, found.value):
        return alone
    found.relu, found.value, found.end = True, reader.outputs[0], place
    # Averages would be made too late for who reads them before the end of the pass.
    averages = step.outputs[1:]
    if any(at <= found.end for number in averages for at, _ in program.readers[number]):
        alone.why = "its running averages are read before the ReLU"
        return alone
    reader, place = _reader(program, found.value)
    is_dropout = reader is not None and reader.mark is not None and reader.mark.kind in _DROPOUT
    if is_dropout and found.residual is None:
        assert reader is not None
        assert reader.mark is not None
        if reader.mark.is_plain and program.readers[found.value][0][1] == 0:
            found.dropout, found.value, found.end = place, reader.outputs[0], place
    return found


def _reader(program: Program, number: int) -> tuple[Step | None, int]:
    """Who alone reads a value, and where; or None."""
    reader = program.only_reader(number)
    return (None, START) if reader is None else (reader, program.readers[number][0][0])


def _no_relu(program: Program, number: int) -> str:
    names = reads(program, number)
    return f"no ReLU, its result is read by {', '.join(f'`{name}`' for name in names)}"


def _chain(program: Program, found: Pass) -> list[int]:
    """Positions of the steps of a pass after the norm."""
    chain = []
    value = program.steps[found.norm].outputs[0]
    while value != found.value:
        position = program.readers[value][0][0]
        chain.append(position)
        value = program.steps[position].outputs[0]
    return chain


def _is_left(program: Program, step: Step) -> str:
    """Why a batch norm cannot be fused, or nothing."""
    assert step.mark is not None
    for average in step.outputs[1:]:
        for position, _ in program.readers[average]:
            reader = program.steps[position]
            # `BatchNormRelu` passes no gradient through them.
            if reader.mark is None or reader.mark.kind is not nnx.BatchNorm:
                return step.mark.why or f"its running averages are read by `{reader.name}`"
    return step.mark.why


def _rests(program: Program, step: Step, found: Pass) -> str:
    """Why there is nothing to gain by fusing a batch norm, or nothing."""
    assert step.mark is not None
    value = step.outputs[0]
    if not program.readers[value] and value not in program.returned:
        return "nobody reads its result"
    in_training = not step.mark.options["use_running_average"]
    if not in_training and not _packing_readers(program, found.value, found.end):
        return "it is in evaluation mode and no layer packs its result"
    return ""


def _packing_readers(program: Program, number: int, place: int) -> tuple[int, ...]:
    """Positions of SWAT layers that can take a value packed when it is made at ``place``."""
    found = []
    for position, index in program.readers[number]:
        step = program.steps[position]
        mark = step.mark
        if index or mark is None or mark.kind not in _SWAT or not mark.is_plain:
            continue
        # Their thresholds are needed then.
        if all(program.defined[operand] < place for operand in step.inputs[1:]):
            found.append(position)
    return tuple(found)


def _packing(program: Program, passes: dict[int, Pass]) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    made = {one.value for one in passes.values()}
    for one in passes.values():
        found[one.value] = _packing_readers(program, one.value, one.end)
    # What nobody normalised is packed once for several readers; a single one packs for itself.
    for number, place in program.defined.items():
        if number not in made and len(program.readers[number]) > 1:
            readers = _packing_readers(program, number, max(place, 0))
            if len(readers) > 1:
                found[number] = readers
    return {number: readers for number, readers in found.items() if readers}


def _pools(program: Program, passes: dict[int, Pass]) -> dict[int, dict[str, Any]]:
    found = {}
    for one in passes.values():
        for position, _ in program.readers[one.value]:
            arguments = patterns.max_pooling(program, program.steps[position])
            if arguments is not None:
                found[position] = arguments
    return found


def _constant_biases(program: Program, passes: dict[int, Pass]) -> set[int]:
    """A norm in training mode takes out every constant, so the bias before it has no gradient."""
    found = set()
    for one in passes.values():
        norm = program.steps[one.norm]
        assert norm.mark is not None
        x = norm.inputs[0]
        place = program.defined[x]
        if norm.mark.options["use_running_average"] or place == START:
            continue
        mark = program.steps[place].mark
        if mark is not None and mark.kind is SwatConv and program.only_reader(x) is norm:
            found.add(place)
    return found
