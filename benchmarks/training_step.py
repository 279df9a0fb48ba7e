"""A training step of a config on synthetic images that lie on the device: what is measured here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import stock_model
from flax import nnx
from methods import Method

from swat_jax import build, config_file, data_parallel, step, training_setup
from swat_jax.data import Info
from swat_jax.models.densenet import DenseLayer, Transition
from swat_jax.models.resnet import BasicBlock, Bottleneck
from swat_jax.models.vgg import ConvUnit
from swat_jax.models.wide_resnet import WideBlock
from swat_jax.sparsity import top_k

# Steps take these in turn: thresholds that are reused would drift on images that are always the
# same, since the network learns them by heart.
BATCHES = 8
NEVER = 10**9  # a period after which nobody waits
# At batches as small as this many steps are dispatched at once, as in training.
MOST_RESIDENT = 128
BLOCKS: tuple[Any, ...] = (BasicBlock, Bottleneck, WideBlock, DenseLayer, Transition)


@dataclasses.dataclass
class TrainingStep:
    """A compiled step with its state, which `run` moves on.

    Attributes:
      config: as it was compiled; thresholds are refreshed where `run` is told to only.
      period: number of steps between exact thresholds that the config asked for.
      info: what the images are.
      compiled: the program.
      state: a training state; None where the step is only compiled.
      batches: images and labels of each batch.
      done: steps that were run.
      notes: which products are not computed in the plain way.
    """

    config: Any
    info: Info
    compiled: Any
    state: Any
    batches: tuple[tuple[jax.Array, jax.Array], ...]
    period: int
    done: int = 0
    notes: tuple[str, ...] = ()

    def run(self, *, refresh: bool = False) -> None:
        """One step, asynchronously; with ``refresh`` one that recomputes thresholds."""
        if refresh:
            self.state = {**self.state, "step": jnp.zeros_like(self.state["step"])}
        self.state, _ = self.compiled(self.state, *self.batches[self.done % len(self.batches)])
        self.done += 1

    def milliseconds(self, count: int, *, refresh: bool = False) -> float:
        """Mean time of a step over ``count`` of them."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(count):
            self.run(refresh=refresh)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / count * 1e3

    @property
    def steps_per_dispatch(self) -> int:
        """How many steps `run` does."""
        return 1

    @property
    def peak_bytes(self) -> int:
        """Most memory that this process had in use, with one batch of images; 0 if unknown."""
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        # The other batches lay there all the time. A training run has one.
        others = sum(array.nbytes for batch in self.batches[1:] for array in batch)
        return max(peak - others, 0)

    @property
    def temporary_bytes(self) -> int:
        """Memory that XLA plans for what lives inside a step."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def xla_bytes(self) -> int:
        """All memory that XLA plans for a step: state, images, results, what lives inside.

        Results that take the place of an argument are counted once.
        """
        found = self.compiled.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + results + found.temp_size_in_bytes


@dataclasses.dataclass
class ResidentSteps(TrainingStep):
    """Many steps in one dispatch on data that lie on the device, as `swat_jax.feed` trains.

    They refresh thresholds as the config asks for. At small batches the host, which takes
    milliseconds to dispatch a step, would be timed otherwise.

    Attributes:
      steps: of a dispatch, whole periods.
      order: of the images.
      trainer: whose steps they are.
    """

    steps: int = 1
    order: jax.Array | None = None
    trainer: Any = None

    def run(self, *, refresh: bool = False) -> None:
        """All steps of a dispatch, asynchronously; those that are due refresh thresholds."""
        start = {**self.state, "step": jnp.zeros_like(self.state["step"])}
        self.state, _ = self.compiled(start, *self.batches[0], self.order)
        self.done += self.steps

    def milliseconds(self, count: int, *, refresh: bool = False) -> float:
        """Mean time of a step over at least ``count`` of them, whole dispatches."""
        dispatches = -(-count // self.steps)
        return super().milliseconds(dispatches) / self.steps

    @property
    def steps_per_dispatch(self) -> int:
        """How many steps `run` does."""
        return self.steps

    @property
    def peak_bytes(self) -> int:
        """As of single steps: with one batch of images in place of the whole data set."""
        return max(super().peak_bytes - self._others, 0)

    @property
    def xla_bytes(self) -> int:
        """Likewise."""
        return super().xla_bytes - self._others

    @property
    def _others(self) -> int:
        images = self.batches[0][0]
        return images.nbytes * (len(images) - self.config.batch_size) // len(images)


def make_method(network: str, method: Method) -> TrainingStep:
    """A step of a network, written CONFIG:BATCH, in one of the ways of `methods.METHODS`."""
    name, batch = network.split(":")
    with apart(method):
        return make(name, method.name, int(batch), settings=method.settings)


def make(
    name: str,
    method: str,
    batch: int,
    *,
    precision: str = "bfloat16",
    settings: Mapping[str, Any] | None = None,
    only_compile: bool = False,
    single: bool = False,
) -> TrainingStep:
    """Compiles a step of ``configs/<name>.py:<method>`` for one device.

    Args:
      name: of the config.
      method: as it is spelled after the config's file.
      batch: images.
      precision: as in the config.
      settings: further values of the config by their dotted names.
      only_compile: whether nothing is put on the device.
      single: whether steps are dispatched one by one, however small the batch.
    """
    config: Any = config_file.load(f"configs/{name}.py:{method}")
    config.batch_size, config.precision = batch, precision
    # What a machine's own tables say would be no part of the method.
    config.sparsity.algorithms = "plain"
    config.update_from_flattened_dict(dict(settings or {}))
    period = config.sparsity.threshold_every_steps
    small = batch <= MOST_RESIDENT and name.startswith("cifar")
    resident = small and not only_compile and not single
    if period > 1 and not resident:  # timed apart: steps that refresh and those that do not
        config.sparsity.threshold_every_steps = NEVER
    size, classes = (224, 1000) if name.startswith("imagenet") else (32, 10)
    info = Info(
        name="synthetic", num_classes=classes, image_shape=(size, size, 3),
        num_train=1_281_167 if size == 224 else 50_000, num_holdout=0, num_test=1,
        mean=(0.5,) * 3, std=(0.25,) * 3, class_names=tuple(map(str, range(classes))),
    )  # fmt: skip
    trainer, make_state = training_setup.make_trainer(config, info, data_parallel.make_mesh(1))
    trainer, notes = training_setup.choose_algorithms(trainer)
    train_step: Any = trainer.train_step
    shape = (batch, size, size, 3)
    if only_compile:
        images: Any = jax.ShapeDtypeStruct(shape, np.uint8)
        labels: Any = jax.ShapeDtypeStruct((batch,), np.int32)
        compiled = train_step.lower(jax.eval_shape(make_state), images, labels).compile()
        return TrainingStep(config, info, compiled, None, (), period, notes=notes)
    rng = np.random.default_rng(0)
    if resident:
        images = rng.integers(0, 256, (info.num_train, *shape[1:]), np.uint8)
        labels = rng.integers(0, classes, info.num_train).astype(np.int32)
        data = tuple(jax.device_put(array, trainer.replicated) for array in (images, labels))
        state, order, steps = make_state(), trainer.epoch_order(0), period * (100 // period or 1)
        many: Any = trainer.train_steps
        compiled = many.lower(state, *data, order, steps).compile()
        batches = ((data[0], data[1]),)
        return ResidentSteps(
            config,
            info,
            compiled,
            state,
            batches,
            period,
            notes=notes,
            steps=steps,
            order=order,
            trainer=trainer,
        )
    batches = tuple(
        step.put_batch(
            trainer,
            rng.integers(0, 256, shape, np.uint8),
            rng.integers(0, classes, batch).astype(np.int32),
        )
        for _ in range(BATCHES)
    )
    state = make_state()
    compiled = train_step.lower(state, *batches[0]).compile()
    return TrainingStep(config, info, compiled, state, batches, period, notes=notes)


@contextlib.contextmanager
def apart(method: Method) -> Iterator[None]:
    """What sets a method apart besides its config, for steps that are compiled inside."""
    with contextlib.ExitStack() as stack:
        if method.backend:
            backend = {"SWAT_JAX_BACKEND": method.backend}
            stack.enter_context(mock.patch.dict(os.environ, backend))
        if method.checkpoints:
            stack.enter_context(checkpointed_blocks())
        if method.own_model:
            stack.enter_context(mock.patch.object(build, "build", stock_model.make))
        if method.sorts:
            stack.enter_context(mock.patch.object(top_k, "threshold", sorted_threshold))
        yield


def sorted_threshold(x: jax.Array, keep: top_k.Count) -> jax.Array:
    """`swat_jax.sparsity.top_k.threshold` by a full sort, for 1 <= keep <= x.size and no NaN."""
    low = top_k.words(keep, two_words=False)[0]
    return jnp.sort(jnp.abs(x).ravel())[x.size - low.astype(jnp.int32)]


class _Stage(NamedTuple):
    """Convs of a VGG stage that are yet to be computed, together."""

    x: Any
    units: tuple[Any, ...]
    after: tuple[Any, ...]


@contextlib.contextmanager
def checkpointed_blocks() -> Iterator[None]:
    """Models that run inside keep the inputs of their blocks alone: `jax.checkpoint` around each.

    A block is a residual block, a dense layer or a transition; of VGG, all convs of a stage with
    their norms. Parameters and running averages are those of the model.
    """

    def checkpointed(call: Any) -> Any:
        @functools.wraps(call)
        def again(block: Any, x: Any, *rest: Any) -> Any:
            return nnx.remat(lambda block, x: call(block, x, *rest))(block, x)

        return again

    def unit(self: Any, x: Any, after: Any) -> Any:
        given, units, afters = x if isinstance(x, _Stage) else _Stage(x, (), ())
        stage = _Stage(given, (*units, self), (*afters, after))
        if "dense" not in after:
            return stage  # the last conv of the stage computes them all

        def run(units: Any, x: Any) -> Any:
            for one, follow in zip(units, stage.after, strict=True):
                x = plain_unit(one, x, follow)
            return x

        return nnx.remat(run)(stage.units, given)

    plain_unit = ConvUnit.__call__
    with contextlib.ExitStack() as stack:
        for kind in BLOCKS:
            patch = mock.patch.object(kind, "__call__", checkpointed(kind.__call__))
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(ConvUnit, "__call__", unit))
        yield
