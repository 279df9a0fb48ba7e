"""One training step and one evaluation step, pure functions over a mesh of devices.

Data parallel by `jax.shard_map` over the axis ``data``: every device has all weights and a part of
the batch. Gradients and running batch-norm averages are averaged over the devices. Top-K of
activations is per device, as in the paper, so activation thresholds have a leading axis with one
value per device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from swat_jax import build, flops, network, optimizer, pruning
from swat_jax.data import Info, on_device
from swat_jax.data_parallel import AXIS
from swat_jax.layer_state import MeasuredSparsity
from swat_jax.layers import find_weight_thresholds
from swat_jax.network import Network, Tree
from swat_jax.sparsity import thresholds

# What a step's randomness is for. Each has a key of its own: the network derives the keys of its
# dropout layers from one by their number, augmentation splits the other.
_FOR_NETWORK, _FOR_AUGMENTATION = 0, 1

# A training state is a dict of trees, so that a checkpoint is one too:
#   the collections of `network.STATEFUL`,
#   "optimizer": the state of the optax transformation,
#   "step": int32, optimizer steps done,
#   "stale": bool, whether stored thresholds must not be used (a new run, or other devices),
#   "key": uint32, key data from which the randomness of every step is derived.
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """All that training needs besides the state; made by `training_setup.make_trainer`.

    Attributes:
      config: the run's config.
      info: the data set's facts.
      mesh: from `data_parallel.make_mesh`.
      sparse: the network that is trained.
      dense: the same network of stock layers, in which weights are evaluated.
      layers: the sparse layers.
      transformation: the optimizer.
      steps_per_epoch: optimizer steps.
    """

    config: Any
    info: Info
    mesh: Mesh
    sparse: Network
    dense: Network
    layers: tuple[pruning.SparseLayer, ...]
    transformation: optax.GradientTransformation
    steps_per_epoch: int

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of what every device has whole."""
        return NamedSharding(self.mesh, P())

    @property
    def sharded(self) -> NamedSharding:
        """Sharding of what is split over the devices along its first axis."""
        return NamedSharding(self.mesh, P(AXIS))

    def state_sharding(self) -> dict[str, NamedSharding]:
        """Sharding of each entry of a state."""
        names = (*network.STATEFUL, "optimizer", "step", "stale", "key")
        return {
            name: self.sharded if name == "activation_thresholds" else self.replicated
            for name in names
        }

    @functools.cached_property
    def layer_table(self) -> list[flops.Layer]:
        """All conv and linear layers in execution order, with their MACs."""
        return flops.network_table(
            self.config.model.name,
            num_classes=self.info.num_classes,
            image_shape=self.info.image_shape,
        )

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """``(state, images uint8 (B, H, W, C), labels (B,)) -> (state, metrics)``, compiled.

        The state that is given is used up. Metrics are means over the batch: ``loss``,
        ``accuracy``.
        """
        step = self._on_mesh(self._local_step, (P(AXIS), P(AXIS)), (self._state_specs(), P()))
        # A threshold that is shared is not read. Without it results would be paired with the memory
        # of others, and copied.
        return jax.jit(step, donate_argnums=0, keep_unused=True)

    @functools.cached_property
    def train_steps(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """``(state, images, labels, order, count) -> (state, metrics)``: steps on resident data.

        The whole training set is on every device; ``order`` (N,) says which images the present
        epoch visits, ``count`` (static) how many steps to do. Metrics have a leading axis of that
        length.
        """

        def several(
            state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array, count: int
        ) -> tuple[TrainState, Metrics]:
            body = functools.partial(self._resident_step, images, labels, order)
            if count > 1:
                return lax.scan(lambda state, _: body(state), state, length=count)
            state, metrics = body(state)
            return state, jax.tree.map(lambda value: value[None], metrics)

        @functools.partial(jax.jit, static_argnums=4, donate_argnums=0, keep_unused=True)
        def steps(
            state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array, count: int
        ) -> tuple[TrainState, Metrics]:
            local = functools.partial(several, count=count)
            run = self._on_mesh(local, (P(), P(), P()), (self._state_specs(), P()))
            return run(state, images, labels, order)

        return steps

    @functools.cached_property
    def epoch_order(self) -> Callable[[int], jax.Array]:
        """The order in which an epoch visits resident training images, on every device."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)

        @functools.partial(jax.jit, out_shardings=self.replicated)
        def order(epoch: jax.Array) -> jax.Array:
            return on_device.epoch_order(key, self.info.num_train, epoch)

        return lambda epoch: order(np.int32(epoch))

    @functools.cached_property
    def eval_step(self) -> Callable[..., Metrics]:
        """``(params, batch_stats, images, labels) -> sums``, in the dense network.

        Sums over the rows whose label is not negative: ``count``, ``loss``, ``correct``,
        ``correct_top5``.
        """
        classes = self.info.num_classes

        def local(params: Tree, stats: Tree, images: jax.Array, labels: jax.Array) -> Metrics:
            model = self.dense.model({"params": params, "batch_stats": stats})
            model.eval()
            logits = self._logits(model, images)
            real = labels >= 0
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
            truth = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)
            # Of equal logits the first counts as larger, as in argmax.
            before = jnp.arange(classes) < labels[:, None]
            rank = jnp.sum((logits > truth) | ((logits == truth) & before), axis=1)
            sums = {
                "count": real,
                "loss": jnp.where(real, loss, 0),
                "correct": real & (rank < 1),
                "correct_top5": real & (rank < 5),
            }
            # NaN compares as false with everything and would count as a hit.
            finite = jnp.all(jnp.isfinite(logits), axis=1)
            sums["correct"] &= finite
            sums["correct_top5"] &= finite
            return {
                name: lax.psum(jnp.sum(value, dtype=jnp.float32), AXIS)
                for name, value in sums.items()
            }

        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(), P(), P(AXIS), P(AXIS)),
            out_specs=P(),
            check_vma=False,
        )
        return jax.jit(run)

    @functools.cached_property
    def measure(self) -> Callable[..., dict[str, jax.Array]]:
        """``(state, images, labels) -> {path: float32[3]}``: see `layer_state.MeasuredSparsity`.

        A forward pass in training mode with the thresholds that the last step left; it changes
        nothing. Means over the devices.
        """

        def local(state: TrainState, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
            del labels
            key = self._step_key(state, _FOR_NETWORK)
            # Age 1: thresholds that are state are used as they are.
            model = self.sparse.model(state, key=key, age=jnp.where(state["stale"], 0, 1))
            model.train()
            model.set_attributes(measure=True, raise_if_not_found=False)
            self._logits(model, images)
            found = network.collection(model, MeasuredSparsity)
            return {
                layer.path: lax.pmean(
                    network.lookup(found, f"{layer.path}/measured_sparsity"), AXIS
                )
                for layer in self.layers
            }

        return jax.jit(self._on_mesh(local, (P(AXIS), P(AXIS)), P()))

    @functools.cached_property
    def is_finite(self) -> Callable[[TrainState], jax.Array]:
        """Whether weights, running averages and momentum hold neither NaN nor infinity.

        The loss of a step is taken before its update and does not show what the update broke.
        """

        def check(state: TrainState) -> jax.Array:
            parts = [state[name] for name in ("params", "batch_stats", "optimizer")]
            found = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(parts)]
            return jnp.all(jnp.stack(found))

        return jax.jit(check)

    @functools.cached_property
    def prune(self) -> Callable[[TrainState], Tree]:
        """The weights under exact masks of the present budgets, hard zeros elsewhere."""
        return jax.jit(lambda state: pruning.prune(self.layers, state["params"], state["budgets"]))

    @functools.cached_property
    def mask_as_stored(self) -> Callable[[TrainState], Tree]:
        """The weights under the masks that the stored thresholds give."""
        return jax.jit(
            lambda state: pruning.prune(
                self.layers, state["params"], state["budgets"], state["weight_thresholds"]
            )
        )

    def _on_mesh(self, local: Callable[..., Any], rest: tuple[Any, ...], out: Any) -> Any:
        """`shard_map` of a function of the state and more; it sees its own thresholds only."""

        def body(state: TrainState, *arguments: Any) -> Any:
            own = {**state, "activation_thresholds": _first(state["activation_thresholds"])}
            result = local(own, *arguments)
            if isinstance(result, tuple):
                new, metrics = result
                stacked = jax.tree.map(lambda leaf: leaf[None], new["activation_thresholds"])
                return {**new, "activation_thresholds": stacked}, metrics
            return result

        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(self._state_specs(), *rest),
            out_specs=out,
            check_vma=False,
        )

    def _state_specs(self) -> dict[str, Any]:
        return {name: sharding.spec for name, sharding in self.state_sharding().items()}

    def _step_key(self, state: TrainState, purpose: int) -> jax.Array:
        """What this device's randomness in this step comes from."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        key = jax.random.fold_in(key, lax.axis_index(AXIS))
        return jax.random.fold_in(key, purpose)

    def _logits(self, model: Any, images: jax.Array) -> jax.Array:
        dtype = build.PRECISIONS[self.config.precision]
        inputs = on_device.normalize(images, self.info.mean, self.info.std, dtype)
        return model(inputs).astype(jnp.float32)

    def _resident_step(
        self, images: jax.Array, labels: jax.Array, order: jax.Array, state: TrainState
    ) -> tuple[TrainState, Metrics]:
        batch = self.config.batch_size // self.mesh.size
        position = state["step"] % self.steps_per_epoch
        start = position * self.config.batch_size + lax.axis_index(AXIS) * batch
        rows = lax.dynamic_slice_in_dim(order, start, batch)
        key = self._step_key(state, _FOR_AUGMENTATION)
        chosen = on_device.augment(key, images[rows], self.config.data.augmentation)
        return self._local_step(state, chosen, labels[rows])

    def _local_step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        config = self.config
        key = self._step_key(state, _FOR_NETWORK)
        due = thresholds.is_refresh_step(
            state["step"] % self.steps_per_epoch,
            state["step"] // self.steps_per_epoch,
            every_steps=config.sparsity.threshold_every_steps,
            exact_epochs=config.sparsity.exact_epochs,
        )
        age = jnp.where(due | state["stale"], 0, 1)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, self.info.num_classes), config.label_smoothing
        )

        def loss_of(params: Tree) -> tuple[jax.Array, tuple[jax.Array, dict[str, Tree]]]:
            model = self.sparse.model({**state, "params": params}, key=key, age=age)
            model.train()
            with find_weight_thresholds(model):
                logits = self._logits(model, images)
            loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
            return loss, (logits, network.values(model))

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (logits, new)), grads = gradient(state["params"])
        grads = lax.pmean(grads, AXIS)
        updates, optimizer_state = self.transformation.update(
            grads, state["optimizer"], state["params"]
        )
        budgets = state["budgets"]
        if budgets:
            kept = pruning.masks(self.layers, state["params"], budgets, new["weight_thresholds"])
            momentum = optimizer.momentum_buffer(optimizer_state)
            budgets = pruning.redistribute(self.layers, kept, momentum, budgets)
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
        }
        after = {
            **state,
            "params": optax.apply_updates(state["params"], updates),
            "batch_stats": lax.pmean(new["batch_stats"], AXIS),
            "weight_thresholds": new["weight_thresholds"],
            "activation_thresholds": new["activation_thresholds"],
            "budgets": budgets,
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
            "stale": jnp.zeros_like(state["stale"]),
        }
        return after, lax.pmean(metrics, AXIS)


def put_batch(trainer: Trainer, images: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """This process's part of a batch, spread over its devices.

    Rows that a last evaluation batch lacks for an even split are padded with the label -1.
    """
    local = trainer.mesh.local_mesh.size
    missing = -len(labels) % local
    if missing:
        images = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
        labels = np.pad(labels, (0, missing), constant_values=-1)
    put = functools.partial(jax.make_array_from_process_local_data, trainer.sharded)
    return put(images), put(labels)


def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[0], tree)
