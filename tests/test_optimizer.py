"""SGD and schedules against a float64 oracle written from PyTorch's documented update rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from swat_jax import optimizer
from swat_jax.errors import UsageError


def make_config(**changes):
    """`config.optimizer`; a change of the schedule is written `schedule__name=...`."""
    config = ConfigDict(
        {
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "decay_batch_norm": True,
            "schedule": {
                "name": "step",
                "milestones": (2, 3),
                "factor": 0.1,
                "warmup_epochs": 0,
            },
        }
    )
    for key, value in changes.items():
        node = config.schedule if key.startswith("schedule__") else config
        with node.ignore_type():
            node[key.removeprefix("schedule__")] = value
    return config


def make_params():
    draw = np.random.default_rng(0).normal
    return {
        "stem": {"kernel": draw(size=(3, 2)), "bias": draw(size=2)},
        "blocks": {0: {"norm": {"scale": draw(size=2), "bias": draw(size=2)}}},
        "classifier": {"kernel": draw(size=(2, 5)), "bias": draw(size=5)},
    }


BATCH_NORM = ("['blocks'][0]['norm']['bias']", "['blocks'][0]['norm']['scale']")


def oracle_sgd(params, gradients, rates, *, momentum, nesterov, decays):
    """Float64, leaf by leaf: torch.optim.SGD's pseudocode with dampening 0."""
    flat = {jax.tree_util.keystr(path): w.copy() for path, w in jax.tree.leaves_with_path(params)}
    buffers = {}
    for step, rate in enumerate(rates):
        for path, g in jax.tree.leaves_with_path(gradients[step]):
            path = jax.tree_util.keystr(path)
            g = g + decays[path] * flat[path]
            buffers[path] = momentum * buffers[path] + g if path in buffers else g
            flat[path] = flat[path] - rate * (
                g + momentum * buffers[path] if nesterov else buffers[path]
            )
    return flat, buffers


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay_batch_norm"),
    [
        case
        for case in itertools.product((0.0, 0.9), (False, True), (False, True))
        if case[0] or not case[1]
    ],
)
def test_sgd_follows_the_oracle(momentum, nesterov, decay_batch_norm):
    steps = 12
    config = make_config(
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.05,
        decay_batch_norm=decay_batch_norm,
        schedule__milestones=(2,),
        schedule__warmup_epochs=1,
    )
    params = make_params()
    draw = np.random.default_rng(1).normal
    gradients = [jax.tree.map(lambda w: draw(size=w.shape), params) for _ in range(steps)]
    rates = [0.1 * min(1, (s + 1) / 4) * (0.1 if s >= 8 else 1) for s in range(steps)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    decays = {p: 0.05 if decay_batch_norm or p not in BATCH_NORM else 0.0 for p in paths}
    assert set(BATCH_NORM) < set(paths)
    expected, buffers = oracle_sgd(
        params, gradients, rates, momentum=momentum, nesterov=nesterov, decays=decays
    )

    schedule = optimizer.learning_rate_schedule(config, steps_per_epoch=4, epochs=3)
    weights = jax.tree.map(jnp.float32, params)
    transform = optimizer.create(config, schedule, weights)
    state = transform.init(weights)

    @jax.jit
    def update(weights, state, g):
        updates, state = transform.update(g, state, weights)
        return optax.apply_updates(weights, updates), state

    for g in gradients:
        weights, state = update(weights, state, jax.tree.map(jnp.float32, g))

    for path, w in jax.tree.leaves_with_path(weights):
        assert w.dtype == jnp.float32
        np.testing.assert_allclose(w, expected[jax.tree_util.keystr(path)], rtol=2e-5, atol=2e-6)
    buffer = optimizer.momentum_buffer(state)
    assert jax.tree.structure(buffer) == jax.tree.structure(weights)
    for path, v in jax.tree.leaves_with_path(buffer):
        np.testing.assert_allclose(v, buffers[jax.tree_util.keystr(path)], rtol=2e-5, atol=2e-6)


def test_weight_decay_alone_moves_only_what_decays():
    config = make_config(weight_decay=0.5, decay_batch_norm=False)
    weights = jax.tree.map(jnp.float32, make_params())
    transform = optimizer.create(config, lambda step: 1.0, weights)
    updates, _ = transform.update(
        jax.tree.map(jnp.zeros_like, weights), transform.init(weights), weights
    )
    for path, update in jax.tree.leaves_with_path(updates):
        moved = bool(jnp.any(update != 0))
        assert moved == (jax.tree_util.keystr(path) not in BATCH_NORM)


def test_decay_mask_looks_for_a_scale_beside_the_bias():
    mask = optimizer.decay_mask(
        {
            "scale_free": {"bias": 0, "kernel": 0},
            "norm": {"scale": 0, "bias": 0},
            "outer": {"scale": {"bias": 0}},  # a layer that is called scale is not a parameter
        }
    )
    assert mask == {
        "scale_free": {"bias": True, "kernel": True},
        "norm": {"scale": False, "bias": False},
        "outer": {"scale": {"bias": True}},
    }


def rates_of(config, steps_per_epoch, epochs):
    schedule = optimizer.learning_rate_schedule(config, steps_per_epoch, epochs)
    steps = jnp.arange(steps_per_epoch * epochs, dtype=jnp.int32)
    return np.asarray(jax.vmap(schedule)(steps))


def test_step_schedule_changes_at_the_first_step_of_an_epoch():
    rates = rates_of(make_config(schedule__factor=0.2), steps_per_epoch=7, epochs=4)
    for step, rate in enumerate(rates):
        drops = sum(step // 7 >= milestone for milestone in (2, 3))
        assert rate == np.float32(0.1 * 0.2**drops), step


def test_imagenet_recipe():
    """lr 0.1 after 5 epochs of warm-up, x0.1 at 30, 60 and 80, at the real 5,005 steps an epoch."""
    config = make_config(schedule__milestones=(30, 60, 80), schedule__warmup_epochs=5)
    rate = optimizer.learning_rate_schedule(config, steps_per_epoch=5005, epochs=90)
    ramp = 5 * 5005
    for step, expected in {
        0: 0.1 / ramp,
        ramp // 2: 0.1 * (ramp // 2 + 1) / ramp,
        ramp - 1: 0.1,
        ramp: 0.1,
        30 * 5005 - 1: 0.1,
        30 * 5005: 0.01,
        60 * 5005 - 1: 0.01,
        60 * 5005: 0.001,
        80 * 5005: 0.0001,
        90 * 5005 - 1: 0.0001,
    }.items():
        np.testing.assert_allclose(rate(step), expected, rtol=3e-7, err_msg=str(step))


def test_warm_up_is_a_straight_line_in_steps():
    rates = rates_of(make_config(schedule__warmup_epochs=1.5), steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose(np.diff(rates[:15]), 0.1 / 15, rtol=1e-5)
    np.testing.assert_allclose(rates[0], 0.1 / 15, rtol=1e-6)
    assert np.all(rates[14:20] == np.float32(0.1))


@pytest.mark.parametrize("warmup", [0, 2])
def test_cosine_schedule(warmup):
    config = make_config(schedule__name="cosine", schedule__warmup_epochs=warmup)
    rates = rates_of(config, steps_per_epoch=10, epochs=6)
    start = 10 * warmup
    steps = np.arange(60)
    expected = 0.05 * (1 + np.cos(np.pi * (steps - start) / (60 - start)))
    np.testing.assert_allclose(rates[start:], expected[start:], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(rates[:start], 0.1 * (steps[:start] + 1) / max(start, 1), rtol=1e-6)
    assert rates[start] == np.float32(0.1)


def test_constant_schedule():
    config = make_config(schedule__name="constant", schedule__milestones=())
    assert set(rates_of(config, 5, 3).tolist()) == {float(np.float32(0.1))}


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_no_array_without_elements_reaches_the_partitioner(name):
    """JAX 0.11.2 dies of one that `shard_map` closes over, on several devices of any kind."""
    config = make_config(schedule__name=name, schedule__milestones=())
    schedule = optimizer.learning_rate_schedule(config, steps_per_epoch=5, epochs=3)
    program = jax.jit(schedule).lower(np.int32(0)).as_text()
    assert "tensor<i32>" in program
    assert "tensor<0x" not in program


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": -0.1},
            r"config\.optimizer\.learning_rate is -0\.1; give a number above",
        ),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; give a number above 0"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan"),
        ({"learning_rate": float("inf")}, r"learning_rate is inf"),
        ({"learning_rate": "0.1"}, r"learning_rate is '0\.1'"),
        ({"momentum": 1.0}, r"momentum is 1\.0; give a number at least 0 and below 1"),
        ({"momentum": -0.5}, r"momentum is -0\.5"),
        ({"momentum": 0.0, "nesterov": True}, r"nesterov is True with .*momentum 0"),
        ({"weight_decay": -1e-4}, r"weight_decay is -0\.0001; give a number at least 0"),
        ({"schedule__name": "exponential"}, r"'exponential'; allowed: step, cosine, constant"),
        ({"schedule__milestones": (3, 2)}, r"milestones is \(3, 2\); give epochs in rising order"),
        ({"schedule__milestones": (2, 2)}, r"rising order"),
        ({"schedule__milestones": (0, 2)}, r"milestones is 0; give a number above 0"),
        ({"schedule__factor": 0.0}, r"schedule\.factor is 0\.0; give a number above 0"),
        ({"schedule__warmup_epochs": -1}, r"warmup_epochs is -1; give a number at least 0"),
        ({"schedule__warmup_epochs": 4}, r"warmup_epochs is 4, but the run has 4 epochs"),
    ],
)
def test_bad_values_are_refused(changes, message):
    config = make_config(**changes)
    with pytest.raises(UsageError, match=message) as caught:
        optimizer.create(
            config, optimizer.learning_rate_schedule(config, steps_per_epoch=3, epochs=4), {}
        )
    assert "\n" not in str(caught.value)


def test_momentum_buffer_wants_exactly_one():
    weights = {"kernel": jnp.ones(3)}
    with pytest.raises(ValueError, match="found 0"):
        optimizer.momentum_buffer(optax.sgd(0.1).init(weights))
