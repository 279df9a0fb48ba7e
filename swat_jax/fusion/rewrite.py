"""Evaluates a program anew: batch norms, SWAT layers and poolings as the plan has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from swat_jax import functional
from swat_jax.activations import Activation, Branches
from swat_jax.dropout import Dropout
from swat_jax.fusion import plan
from swat_jax.fusion.marks import STOCK
from swat_jax.fusion.plan import Pass
from swat_jax.fusion.program import START, Program, Step, open_jaxpr
from swat_jax.fusion.report import NormReport, Report
from swat_jax.fusion.state import values_at
from swat_jax.layers import SwatConv, SwatLinear, find_weight_thresholds
from swat_jax.norm_relu import BatchNormRelu, branch
from swat_jax.sparsity import packing

_SWAT = (SwatConv, SwatLinear)


@dataclasses.dataclass
class Findings:
    """What is found on the way; see `Report`."""

    norms: list[NormReport] = dataclasses.field(default_factory=list)
    layers: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Adds what was found elsewhere."""
        self.norms += other.norms
        self.layers += other.layers
        self.lost += other.lost

    def report(self) -> Report:
        """Everything once."""
        once = dict.fromkeys
        return Report(tuple(self.norms), tuple(once(self.layers)), tuple(once(self.lost)))


def evaluate(jaxpr: Any, inputs: Sequence[Any], findings: Findings) -> list[Any]:
    """The outputs of a jaxpr with marked calls, closed or without constants, for these inputs."""
    program = Program(jaxpr)
    run = _Evaluation(program, inputs, findings)
    with find_weight_thresholds(nnx.List(run.known_layers())):
        for position in range(len(program.steps)):
            run.step(position)
    return [run.values[number] for number in program.outputs]


class _Evaluation:
    """The values of a program, as far as it is evaluated.

    Layers are made again from their state where they are first needed: one that packs its input
    has to be there when that is made.
    """

    def __init__(self, program: Program, inputs: Sequence[Any], findings: Findings) -> None:
        self.program = program
        self.plan = plan.make(program)
        self.findings = findings
        self.values = program.constants | dict(zip(program.inputs, inputs, strict=True))
        self.layers: dict[int, Any] = {}  # by the position of their call
        self.given: dict[int, Activation] = {}  # likewise: their inputs, if someone packed them
        for number in [*program.inputs, *program.constants]:
            self._share(number)

    def known_layers(self) -> list[Any]:
        """SWAT layers whose weights and state are inputs of the program, to be called later.

        Not those whose threshold is among the inputs: then the function's caller has found it.
        """
        layers = [
            self._layer(position)
            for position, step in enumerate(self.program.steps)
            if step.mark is not None
            and step.mark.kind in _SWAT
            and all(self.program.defined[number] == START for number in step.inputs[1:])
        ]
        return [layer for layer in layers if layer.next_weight_threshold is None]

    def step(self, position: int) -> None:
        """Evaluates one step."""
        step = self.program.steps[position]
        if position in self.plan.skipped:
            return
        if position in self.plan.passes:
            self._normalize(self.plan.passes[position])
            return
        if step.mark is not None and step.mark.kind in _SWAT:
            with jax.default_matmul_precision(step.mark.precision):
                results = self._multiply(position)
        else:
            operands = [self.values[number] for number in step.inputs]
            if position in self.plan.pools:
                results = [functional.max_pool(*operands, **self.plan.pools[position])]
            elif step.mark is None:
                results = self._as_it_is(step, operands)
            else:
                results = step.mark.run(*operands)
                if step.mark.kind is nnx.BatchNorm:
                    self._report_left(position)
        for number, value in zip(step.outputs, results, strict=True):
            self.values[number] = value
            self._share(number)

    def _normalize(self, one: Pass) -> None:
        """One pass of a batch norm, with all that belongs to it."""
        program = self.program
        norm_step = program.steps[one.norm]
        mark = norm_step.mark
        assert mark is not None
        norm = self._layer(one.norm)
        output = program.types[norm_step.outputs[0]]
        _become_fused(norm, output, mark.options["use_running_average"])
        positions = self.plan.packing.get(one.value, ())
        dense_for = plan.reads(program, one.value, but=positions)
        x = norm_step.inputs[0]
        is_read_later = any(place > one.end for place, _ in program.readers[x])
        before = is_read_later and program.types[x].dtype == output.dtype
        branches = norm(
            self.values[x],
            None if one.residual is None else self.values[one.residual],
            relu=one.relu,
            readers=[self._layer(position) for position in positions],
            dense=bool(dense_for),
            before=before,
            dropout=None if one.dropout is None else self._dropout(one.dropout),
        )
        self.values |= zip(norm_step.outputs[1:], values_at(norm, mark.changed), strict=True)
        if before:
            self.values[x] = branches.before
        if dense_for:
            self.values[one.value] = branches.dense
        packs_for = self._give(positions, branches)
        self.findings.norms.append(
            NormReport(
                name=mark.name,
                shape=output.shape,
                fused=(
                    "batch norm",
                    *(["addition"] if one.residual is not None else []),
                    *(["relu"] if one.relu else []),
                    *(["dropout"] if one.dropout is not None else []),
                ),
                packs_for=packs_for,
                dense_for=dense_for,
                why=one.why,
            )
        )

    def _multiply(self, position: int) -> list[jax.Array]:
        """The call of a SWAT layer."""
        step = self.program.steps[position]
        mark = step.mark
        assert mark is not None
        options = dict(mark.options)
        if position in self.plan.constant_biases:
            options["constant_bias"] = True
        x = step.inputs[0]
        given = self.given.pop(position, None)
        if given is None:
            given = Activation(self.values[x])
        place = self.program.defined[x]
        if given.packed is None and (mark.is_plain or mark.why) and place != START:
            maker = self.program.steps[place].name
            why = f"; {mark.why}" if mark.why else ""
            self.findings.layers.append(
                f"{step.name}: packs its own input, which is the result of `{maker}`{why}"
            )
        layer = self._layer(position)
        output = STOCK[mark.kind](layer, given, **options)
        return [output, *values_at(layer, mark.changed)]

    def _as_it_is(self, step: Step, operands: list[Any]) -> list[Any]:
        """Any other equation; within a body that is computed again or repeated there is fusion."""
        equation = step.equation
        name = equation.primitive.name
        if step.has_marks_inside:
            if name in ("remat2", "checkpoint", "remat"):
                run = _body(equation.params["jaxpr"], self.findings)
                options = {key: equation.params[key] for key in ("prevent_cse", "policy")}
                return jax.checkpoint(run, **options)(*operands)
            if name == "scan":
                findings = Findings()
                inner = equation.params["jaxpr"]
                types = open_jaxpr(inner).invars
                again = jax.make_jaxpr(_body(inner, findings))(*(v.aval for v in types))
                # Constants of a body are arrays, or it could not be closed.
                is_closed = not any(isinstance(value, Tracer) for value in again.consts)
                if is_closed and again.out_avals == inner.out_avals:
                    self.findings.add(findings)
                    return _bind(equation, operands, jaxpr=again)
            self.findings.lost.append(f"layers within `{name}` are left as they are")
        return _bind(equation, operands)

    def _share(self, number: int) -> None:
        """Packs a value that no batch norm made, if several layers will read it."""
        positions = self.plan.packing.get(number, ())
        if positions:
            layers = [self._layer(position) for position in positions]
            self._give(positions, branch(self.values[number], readers=layers))

    def _give(self, positions: Sequence[int], branches: Branches) -> tuple[str, ...]:
        """Hands layers their inputs; returns the names of those that got it packed."""
        self.given |= zip(positions, branches.readers, strict=True)
        return tuple(
            self.program.steps[position].name
            for position, activation in zip(positions, branches.readers, strict=True)
            if activation.packed is not None
        )

    def _layer(self, position: int) -> Any:
        if position not in self.layers:
            step = self.program.steps[position]
            assert step.mark is not None
            # The input may not be there yet, and is not asked for.
            operands = [None, *(self.values[number] for number in step.inputs[1:])]
            self.layers[position] = step.mark.layer(operands)
        return self.layers[position]

    def _dropout(self, position: int) -> Any:
        step = self.program.steps[position]
        assert step.mark is not None
        key = self.values[step.inputs[1]]
        shape = self.program.types[step.inputs[0]].shape
        return _DrawnDropout(step.mark.kind, step.mark.options["rate"], key, shape)

    def _report_left(self, position: int) -> None:
        step = self.program.steps[position]
        assert step.mark is not None
        why = self.plan.left.get(position)
        if why is not None:
            self.findings.lost.append(f"{step.name}: left as it is, since {why}")
        else:
            why = self.plan.resting[position]
        shape = self.program.types[step.inputs[0]].shape
        self.findings.norms.append(NormReport(step.name, shape, (), why=why))


def _body(jaxpr: Any, findings: Findings) -> Callable[..., list[Any]]:
    return lambda *inputs: evaluate(jaxpr, inputs, findings)


def _bind(equation: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Computes one equation, as `jax.core.eval_jaxpr` does."""
    primitive = equation.primitive
    with equation.ctx.manager:
        results = primitive.bind(
            *operands, **primitive.get_bind_params({**equation.params, **changed})
        )
    return list(results) if primitive.multiple_results else [results]


def _become_fused(norm: Any, output: Any, use_running_average: bool) -> None:
    """Makes a stock batch norm, alone here, a `BatchNormRelu` that returns the same type."""
    object.__setattr__(norm, "__class__", BatchNormRelu)
    norm.dtype = output.dtype
    norm.use_running_average = use_running_average
    wide = jnp.promote_types(output.dtype, jnp.float32)
    channels = output.shape[-1:]
    if norm.scale is None:
        norm.scale = nnx.Param(jnp.ones(channels, wide))
    if norm.bias is None:
        norm.bias = nnx.Param(jnp.zeros(channels, wide))


class _DrawnDropout(Dropout):
    """What a batch norm asks that has a marked dropout in its pass: the bits of that call."""

    def __init__(self, kind: type, rate: float, key: jax.Array, shape: tuple[int, ...]) -> None:
        super().__init__(rate)
        self.kind, self.shape = kind, shape
        self.key = nnx.data(key)

    @property
    def draws(self) -> bool:
        return True

    @property
    def drawn_rate(self) -> float:
        return super().drawn_rate if self.kind is Dropout else self.rate

    def draw(self, size: int) -> jax.Array:
        if self.kind is Dropout:
            return functional.draw_kept(self.key, self.rate, size)
        return packing.to_bitmap(jax.random.bernoulli(self.key, 1.0 - self.rate, self.shape))
