"""Each device is a run of its own until gradients and averages meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import config_file, data, data_parallel, optimizer, step, training_setup
from tests import oracle

PARTS = 4
PART = 16  # images of one device


def digits(devices):
    config = config_file.load("configs/digits.py:u90")
    config.devices, config.batch_size = devices, PART * devices
    config.sparsity.threshold_every_steps = 3
    return config


@pytest.fixture(scope="module")
def dataset():
    return data.load(digits(PARTS))


@pytest.fixture(scope="module")
def batch(dataset):
    found = next(dataset.train(0))
    return found["image"], found["label"]


@pytest.fixture(scope="module")
def single(dataset):
    return training_setup.make_trainer(digits(1), dataset.info, data_parallel.make_mesh(1))


@pytest.fixture(scope="module")
def quarters(single, batch):
    """State and metrics after one step on one device, for each part of the batch."""
    trainer, make_state = single
    found = []
    for part in range(PARTS):
        rows = slice(part * PART, (part + 1) * PART)
        inputs = step.put_batch(trainer, batch[0][rows], batch[1][rows])
        found.append(jax.device_get(trainer.train_step(make_state(), *inputs)))
    return found


@pytest.fixture(scope="module")
def together(dataset, batch, fake_devices):
    trainer, make_state = training_setup.make_trainer(
        digits(PARTS), dataset.info, data_parallel.make_mesh(PARTS)
    )
    return trainer.train_step(make_state(), *step.put_batch(trainer, *batch))


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_mean(found, parts, bound):
    for name, value in found.items():
        mean = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
        scale = max(np.abs(part[name]).max() for part in parts)
        assert np.abs(value - mean).max() <= bound * scale, name
        # The parts differ by far more than the bound, so taking one of them would not pass.
    spread = [np.abs(value - parts[0][name]).max() for name, value in found.items()]
    assert max(spread) > 100 * bound


def test_gradients_and_averages_are_means_of_the_quarters(together, quarters):
    """The first momentum buffer is the gradient (and the decay of equal weights).

    The arithmetic is the same, but for the order of float32 sums where XLA fuses in another way:
    1e-5 of the largest value of each array.
    """
    buffers = [flat(optimizer.momentum_buffer(state["optimizer"])) for state, _ in quarters]
    state, metrics = jax.device_get(together)
    assert_mean(flat(optimizer.momentum_buffer(state["optimizer"])), buffers, 1e-5)
    # The schedule's first rate does not depend on the batch size, so updates are averaged too.
    for name in ("params", "batch_stats"):
        assert_mean(flat(state[name]), [flat(part[name]) for part, _ in quarters], 1e-5)
    for name, value in metrics.items():
        assert value == pytest.approx(np.mean([part[name] for _, part in quarters]), rel=1e-5)


def test_each_device_holds_the_threshold_of_its_quarter(together, quarters):
    found = flat(jax.device_get(together[0]["activation_thresholds"]))
    assert len(found) == 8  # all convs but the first, which is dense
    for name, limits in found.items():
        assert limits.shape == (PARTS,)
        expected = [flat(state["activation_thresholds"])[name][0] for state, _ in quarters]
        assert limits == pytest.approx(expected, rel=1e-5), name
        assert len(set(limits.tolist())) == PARTS, name
    assert {leaf.shape for leaf in jax.tree.leaves(together[0]["weight_thresholds"])} == {()}


def test_what_is_not_sharded_is_the_same_on_every_device(together):
    for name, leaf in flat(together[0]).items():
        if "activation_threshold" not in name:
            copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
            assert len(copies) == PARTS
            assert len(set(copies)) == 1, name


@pytest.mark.parametrize("stale", [True, False])
def test_stale_thresholds_are_recomputed_between_refresh_steps(single, batch, stale):
    trainer, make_state = single
    state = make_state()
    put = {"step": jnp.int32(1), "stale": jnp.asarray(stale)}
    state |= {name: jax.device_put(value, trainer.replicated) for name, value in put.items()}
    names = ("weight_thresholds", "activation_thresholds")
    for name in names:  # keeps nothing, so that nobody mistakes it for a computed one
        state[name] = jax.tree.map(lambda leaf: leaf + 9, state[name])
    params = jax.device_get(state["params"])
    inputs = step.put_batch(trainer, batch[0][:PART], batch[1][:PART])
    state, _ = trainer.train_step(state, *inputs)
    assert not bool(state["stale"])
    found = jax.device_get({name: state[name] for name in names})
    if not stale:
        assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(found)} == {9.0}
        return
    assert all(float(leaf.ravel()[0]) < 9 for leaf in jax.tree.leaves(found))
    kernel = params["stage2"]["0"]["conv1"]["kernel"]
    limit = found["weight_thresholds"]["stage2"]["0"]["conv1"]["weight_threshold"]
    assert limit == oracle.threshold(kernel, oracle.keep_count(0.9, kernel.size))
