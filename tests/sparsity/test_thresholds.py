"""When thresholds are recomputed, and that nothing flows back through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax.errors import UsageError
from swat_jax.sparsity import thresholds, top_k


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("exact_epochs", [0, 2])
@pytest.mark.parametrize("traced", [False, True])
def test_is_refresh_step(every, exact_epochs, traced):
    def ask(step, epoch):
        return thresholds.is_refresh_step(step, epoch, every_steps=every, exact_epochs=exact_epochs)

    if traced:
        ask = jax.jit(ask)
    for epoch in range(4):
        for step in range(16):
            expected = step % every == 0 or epoch < exact_epochs
            assert bool(ask(step, epoch)) == expected


@pytest.mark.parametrize("every", [0, -1, 2.0, "3", None, True])
def test_a_period_that_is_none_is_refused(every):
    with pytest.raises(UsageError, match="threshold_every_steps"):
        thresholds.is_refresh_step(0, 0, every_steps=every)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_refresh_takes_the_stored_value_or_the_new_one(dtype):
    stored = jnp.array(0.3, dtype)
    x = jnp.array([1.5, -2.5, 0.5], dtype)

    def step(due, stored, x):
        return thresholds.refresh(due, stored, lambda: top_k.threshold(x, 1))

    for f in (step, jax.jit(step)):
        for due, expected in [(jnp.array(True), 2.5), (jnp.array(False), float(stored))]:
            result = f(due, stored, x)
            assert result.dtype == dtype
            assert float(result) == expected
    assert float(step(True, stored, x)) == 2.5
    assert float(step(False, stored, x)) == float(stored)


def test_work_is_skipped_between_refreshes():
    computed = []

    def expensive():
        jax.debug.callback(lambda: computed.append(1))
        return jnp.float32(2.0)

    f = jax.jit(lambda due: thresholds.refresh(due, jnp.float32(1.0), expensive))
    assert float(f(False)) == 1.0
    jax.effects_barrier()
    assert computed == []
    assert float(f(True)) == 2.0
    jax.effects_barrier()
    assert computed == [1]


@pytest.mark.parametrize("due", [True, jnp.array(True)])
def test_no_gradient_flows_through_a_refreshed_threshold(due):
    x = jnp.array([1.0, 4.0, 2.0])
    gradient = jax.grad(lambda x: thresholds.refresh(due, jnp.float32(0), lambda: jnp.max(x)))(x)
    np.testing.assert_array_equal(gradient, jnp.zeros(3))


def test_period_and_state_through_a_scan():
    """Thresholds of steps 0, 3, 6 are used for three steps each."""
    xs = jax.random.normal(jax.random.key(0), (8, 10))

    def step(stored, inputs):
        index, x = inputs
        due = thresholds.is_refresh_step(index, 0, every_steps=3)
        stored = thresholds.refresh(due, stored, lambda: top_k.threshold(x, 2))
        return stored, stored

    _, used = jax.lax.scan(step, jnp.float32(0), (jnp.arange(8), xs))
    expected = [np.sort(np.abs(xs[3 * (i // 3)]))[-2] for i in range(8)]
    np.testing.assert_array_equal(used, expected)
