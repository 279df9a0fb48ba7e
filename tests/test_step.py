"""One step: over devices, over periods, and SWAT-M's budgets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from swat_jax import data, data_parallel, network, optimizer, pruning, step, training_setup
from swat_jax.errors import UsageError
from tests import oracle
from tests.runs import digits

BATCH = 32


@functools.cache
def facts():
    return data.load(digits()).info


@functools.cache
def trainer_of(method="u90", devices=1, **overrides):
    config = digits(method, devices=devices, batch_size=BATCH, **overrides)
    return training_setup.make_trainer(config, facts(), data_parallel.make_mesh(devices))


@functools.cache
def batch(size=BATCH):
    dataset = data.load(digits(batch_size=size))
    first = next(dataset.train(0))
    return first["image"], first["label"]


def one_step(method="u90", devices=1, **overrides):
    trainer, make_state = trainer_of(method, devices, **overrides)
    before = make_state()
    start = jax.device_get(before)
    after, metrics = trainer.train_step(before, *step.put_batch(trainer, *batch()))
    return trainer, start, jax.device_get(after), jax.device_get(metrics)


def assert_close(ours, theirs, bound):
    for path, value in jax.tree.leaves_with_path(ours):
        other = functools.reduce(lambda node, part: node[part.key], path, theirs)
        scale = max(np.abs(other).max(), 1e-3)
        assert np.abs(value - other).max() <= bound * scale, jax.tree_util.keystr(path)


def test_four_devices_are_one_where_nothing_is_per_device(fake_devices):
    """Sparse weights, dense activations, batch norm over all: only the order of sums differs.

    Sums of at most 32 * 8 * 8 terms in float32, through 9 layers: 1e-4 of the largest value.
    """
    options = {"sparsity__activation": 0.0, "sync_batch_norm": True}
    _, _, one, one_metrics = one_step(devices=1, **options)
    _, _, four, four_metrics = one_step(devices=4, **options)
    assert four_metrics["loss"] == pytest.approx(one_metrics["loss"], rel=1e-5)
    assert four_metrics["accuracy"] == one_metrics["accuracy"]
    assert_close(four["params"], one["params"], 1e-4)
    assert_close(four["batch_stats"], one["batch_stats"], 1e-4)


def test_thresholds_are_recomputed_when_they_are_due():
    """At every third step of an epoch, and at every step of the exact first epoch."""
    trainer, make_state = trainer_of(sparsity__threshold_every_steps=3, sparsity__exact_epochs=1)
    state = make_state()
    inputs = step.put_batch(trainer, *batch())
    seen = []
    for epoch in (1, 2):
        # The last two steps of an epoch and the first two of the next.
        start = jnp.int32(epoch * trainer.steps_per_epoch - 2)
        state["step"] = jax.device_put(start, trainer.replicated)
        for _ in range(4):
            before = limits(state)
            state, _ = trainer.train_step(state, *inputs)
            seen.append(limits(state) != before)
    # 44 steps of 32 to an epoch: the last two are its steps 42 and 43.
    assert trainer.steps_per_epoch == 44
    still_exact = [True, True]
    assert seen == [*still_exact, True, False, True, False, True, False]


def limits(state):
    names = ("weight_thresholds", "activation_thresholds")
    return [float(leaf.ravel()[0]) for name in names for leaf in jax.tree.leaves(state[name])]


def test_budgets_follow_momentum():
    """Against the float64 oracle, fed with this step's masks and momentum."""
    trainer, start, after, _ = one_step("m90")
    masks = jax.device_get(pruning.masks(trainer.layers, start["params"], start["budgets"]))
    momentum = optimizer.momentum_buffer(after["optimizer"])
    sizes = [layer.size for layer in trainer.layers]
    means = [
        np.abs(network.lookup(momentum, layer.path)["kernel"].astype(np.float64))[
            masks[layer.path]
        ].mean()
        for layer in trainer.layers
    ]
    total = sum(jax.tree.leaves(start["budgets"]))
    budgets = [
        int(network.lookup(after["budgets"], x.path)["weight_budget"]) for x in trainer.layers
    ]
    assert sum(budgets) == total
    expected = oracle.momentum_budgets(np.array(means), np.array(sizes), int(total))
    assert np.abs(np.array(budgets) - expected).max() <= len(sizes) + 1
    assert budgets != [
        int(network.lookup(start["budgets"], x.path)["weight_budget"]) for x in trainer.layers
    ]


def test_a_new_budget_waits_for_the_refresh():
    trainer, make_state = trainer_of("m90", sparsity__threshold_every_steps=2)
    state = make_state()
    inputs = step.put_batch(trainer, *batch())
    state, _ = trainer.train_step(state, *inputs)
    limits, budgets = jax.device_get((state["weight_thresholds"], state["budgets"]))
    state, _ = trainer.train_step(state, *inputs)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(a == b), limits, jax.device_get(state["weight_thresholds"]))
    )
    params = jax.device_get(state["params"])
    used = jax.device_get(state["budgets"])
    assert used != budgets
    state, _ = trainer.train_step(state, *inputs)
    for layer in trainer.layers:
        limit = network.lookup(state["weight_thresholds"], f"{layer.path}/weight_threshold")
        if limit is None:
            continue  # linear: always exact
        kernel = np.abs(network.lookup(params, layer.path)["kernel"])
        keep = int(network.lookup(used, layer.path)["weight_budget"])
        assert float(limit) == np.sort(kernel.ravel())[-keep]


def test_pruned_weights_have_exactly_k_values():
    trainer, make_state = trainer_of("u90")
    state = make_state()
    pruned = jax.device_get(trainer.prune(state))
    for layer in trainer.layers:
        kernel = network.lookup(pruned, layer.path)["kernel"]
        expected = oracle.keep_count(layer.weight_sparsity, layer.size)
        assert np.count_nonzero(kernel) == expected
        master = network.lookup(jax.device_get(state["params"]), layer.path)["kernel"]
        assert set(kernel[kernel != 0].tolist()) <= set(master.ravel().tolist())


def test_evaluation_counts_rows_and_ranks():
    trainer, make_state = trainer_of("dense")
    state = make_state()
    images, labels = batch()
    labels = labels.copy()
    labels[-5:] = -1
    sums = trainer.eval_step(
        state["params"], state["batch_stats"], *step.put_batch(trainer, images, labels)
    )
    model = trainer.dense.model({"params": state["params"], "batch_stats": state["batch_stats"]})
    model.eval()
    pixels = (images / 255 - np.array(facts().mean)) / np.array(facts().std)
    logits = np.asarray(model(jnp.asarray(pixels, jnp.float32)), np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    real = labels >= 0
    assert float(sums["count"]) == real.sum() == BATCH - 5
    assert float(sums["correct"]) == (order[:, 0] == labels)[real].sum()
    assert float(sums["correct_top5"]) == (order[:, :5] == labels[:, None]).any(1)[real].sum()
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(BATCH), labels]
    assert float(sums["loss"]) == pytest.approx(losses[real].sum(), rel=1e-4)


def test_a_broken_network_scores_nothing():
    trainer, make_state = trainer_of("dense")
    state = make_state()
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state["params"])
    sums = trainer.eval_step(broken, state["batch_stats"], *step.put_batch(trainer, *batch()))
    assert float(sums["correct"]) == float(sums["correct_top5"]) == 0


def test_measured_sparsity_is_that_of_the_masks():
    trainer, make_state = trainer_of("u90")
    state = make_state()
    found = jax.device_get(trainer.measure(state, *step.put_batch(trainer, *batch())))
    pruned = jax.device_get(trainer.prune(state))
    for layer in trainer.layers:
        kernel = network.lookup(pruned, layer.path)["kernel"]
        weights, activations, dropped = found[layer.path]
        assert dropped == 0
        assert weights == pytest.approx(np.mean(kernel == 0), abs=1e-6)
        assert activations >= (0 if layer.weight_sparsity == 0 else 0.899)


def test_the_seed_decides_about_weights_order_and_randomness():
    """Each of them: one alone would make runs differ, and hide that another does not."""
    parts = []
    for seed in (0, 1):
        trainer, make_state = trainer_of(seed=seed)
        state = jax.device_get(make_state())
        kernel = state["params"]["stem"]["kernel"]
        parts.append((kernel, state["key"], *map(trainer.epoch_order, (0, 1))))
    for one, other in zip(*parts, strict=True):
        assert not np.array_equal(one, other)
    *_, first, second = parts[0]
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.arange(facts().num_train))


def test_augmentation_shares_no_key_with_dropout(monkeypatch):
    """Not with any of the layers either, whose keys the network derives from its own by number."""
    trainer, make_state = trainer_of()
    keys = {}
    model = network.Network.model

    def spy_model(self, collections, *, key=None, age=0):
        keys["network"] = key
        return model(self, collections, key=key, age=age)

    def spy_augment(key, images, kind):
        keys["augmentation"] = key
        return images

    monkeypatch.setattr(network.Network, "model", spy_model)
    monkeypatch.setattr(step.on_device, "augment", spy_augment)
    images, labels = map(jnp.asarray, batch())

    def local(state):
        trainer._resident_step(images, labels, jnp.arange(BATCH), state)
        return [jax.random.key_data(keys[name]) for name in ("network", "augmentation")]

    found = jax.jit(trainer._on_mesh(local, (), P()))(make_state())
    base, augmentation = (jax.random.wrap_key_data(data) for data in found)
    derived = jax.vmap(lambda n: jax.random.fold_in(base, n))(jnp.arange(1000))
    used = jnp.concatenate([jax.random.key_data(base)[None], jax.random.key_data(derived)])
    assert not np.any(np.all(used == jax.random.key_data(augmentation), axis=1))


def test_devices_are_checked():
    with pytest.raises(UsageError, match=r"config\.devices"):
        data_parallel.make_mesh(1000)
    with pytest.raises(UsageError, match="divisible by the 4 devices"):
        training_setup.make_trainer(
            digits(batch_size=30, devices=4), facts(), data_parallel.make_mesh(4)
        )
