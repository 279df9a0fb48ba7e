"""From a config to a trainer: values are checked, networks built, algorithms chosen."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from swat_jax import build, dispatch, network, optimizer, pruning
from swat_jax.data import Info
from swat_jax.errors import UsageError
from swat_jax.step import Trainer, TrainState


def make_trainer(config: Any, info: Info, mesh: Mesh) -> tuple[Trainer, Callable[[], TrainState]]:
    """Builds the networks and the optimizer of a config.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      info: of the data set.
      mesh: from `data_parallel.make_mesh`.

    Returns:
      The trainer, and a function that makes the state of step 0, on the mesh.

    Raises:
      UsageError: a config value that cannot be met.
    """
    check(config, mesh)
    if info.num_train < config.batch_size:
        raise UsageError(
            f"config.batch_size is {config.batch_size}, but there are {info.num_train} images"
        )
    facts = {"num_classes": info.num_classes, "image_shape": info.image_shape}

    def initial(seed: int) -> nnx.Module:
        return build.build(config, **facts, rngs=nnx.Rngs(seed))

    abstract = nnx.eval_shape(lambda: initial(0))
    dense = nnx.eval_shape(lambda: build.build_dense(config, **facts, rngs=nnx.Rngs(0)))
    sparse, shapes = network.split(abstract)
    steps_per_epoch = info.num_train // config.batch_size
    schedule = optimizer.learning_rate_schedule(config.optimizer, steps_per_epoch, config.epochs)
    trainer = Trainer(
        config=config,
        info=info,
        mesh=mesh,
        sparse=sparse,
        dense=network.split(dense)[0],
        layers=pruning.layers_of(abstract),
        transformation=optimizer.create(config.optimizer, schedule, shapes["params"]),
        steps_per_epoch=steps_per_epoch,
    )

    def make_state() -> TrainState:
        collections = network.values(initial(config.seed))
        limits = collections["activation_thresholds"]
        state = {
            **collections,
            "activation_thresholds": jax.tree.map(
                lambda leaf: jnp.tile(leaf, (mesh.size,)), limits
            ),
            "optimizer": trainer.transformation.init(collections["params"]),
            "step": jnp.zeros((), jnp.int32),
            "stale": jnp.ones((), bool),
            "key": jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 2)),
        }
        return jax.jit(lambda tree: tree, out_shardings=trainer.state_sharding())(state)

    return trainer, make_state


def choose_algorithms(trainer: Trainer) -> tuple[Trainer, tuple[str, ...]]:
    """Gives the sparse layers what `config.sparsity.algorithms` chooses for them.

    Returns:
      A trainer whose steps compute with that; and lines that say so, for people.

    Raises:
      UsageError: a table that cannot be read, or several processes that have different ones.
    """
    config = trainer.config
    model = nnx.merge(trainer.sparse.graph, *trainer.sparse.types.values())
    images = (config.batch_size // trainer.mesh.size, *trainer.info.image_shape)
    choice = dispatch.choose(
        model,
        jax.ShapeDtypeStruct(images, build.PRECISIONS[config.precision]),
        config.sparsity.algorithms,
        trainer.mesh.devices.flat[0].device_kind,
    )
    if jax.process_count() > 1:
        # What they compile together must be the same.
        mark = np.uint32(zlib.crc32(repr(sorted(choice.algorithms.items())).encode()))
        if len(set(np.ravel(multihost_utils.process_allgather(mark)).tolist())) > 1:
            raise UsageError(
                f"{dispatch.SETTING} is {config.sparsity.algorithms!r}, and the processes of this "
                f"run have different tables; give all of them the same one, or {dispatch.PLAIN_WAY}"
            )
    dispatch.apply(model, choice)
    return dataclasses.replace(trainer, sparse=network.split(model)[0]), choice.notes


def check(config: Any, mesh: Mesh) -> None:
    """Refuses what cannot be trained, as far as it shows without the data.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      mesh: from `data_parallel.make_mesh`.

    Raises:
      UsageError: names the key, what it is and what is allowed.
    """
    for key, value, lowest in _counts(config):
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise UsageError(f"config.{key} must be a whole number >= {lowest}, got {value!r}")
    if config.batch_size % mesh.size:
        raise UsageError(
            f"config.batch_size must be divisible by the {mesh.size} devices, got "
            f"{config.batch_size}; change it or config.devices"
        )
    smoothing = config.label_smoothing
    if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise UsageError(f"config.label_smoothing must be in [0, 1), got {smoothing!r}")
    build.check(config)
    schedule = optimizer.learning_rate_schedule(config.optimizer, 1, config.epochs)
    optimizer.create(config.optimizer, schedule, {})


def _counts(config: Any) -> Sequence[tuple[str, Any, int]]:
    return (
        ("epochs", config.epochs, 1),
        ("batch_size", config.batch_size, 1),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("eval.every_epochs", config.eval.every_epochs, 1),
        ("log.every_steps", config.log.every_steps, 1),
        ("checkpoint.every_epochs", config.checkpoint.every_epochs, 1),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("seed", config.seed, 0),
    )
