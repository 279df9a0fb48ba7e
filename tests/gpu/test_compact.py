"""The compact form of sparse kernels on a GPU, against loops over single weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels
from swat_jax.sparsity.compact import VECTORS
from tests.runs import needs_library
from tests.sparsity.test_compact import CASES, check, draw

pytestmark = needs_library
LARGE = [((3, 3), 128, 128, 32, 2), ((1, 1), 520, 256, 64, 4), ((3, 3), 3, 64, 16, 2)]
compact = jax.jit(kernels.compact, static_argnums=(1, 2, 3))


@pytest.fixture(autouse=True)
def kernels_are_in_use():
    assert kernels.backend() == "cuda"


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize(("window", "inputs", "outputs", "chunk", "multiple"), CASES + LARGE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_definition(window, inputs, outputs, chunk, multiple, vector, dtype):
    for share in (0.1, 0.6):
        kernel = draw(window, inputs, outputs, share, dtype)
        check(compact(kernel, vector, chunk, multiple), kernel, vector, chunk, multiple)


def test_nothing_everything_nan_and_negative_zero():
    zeros = jnp.zeros((3, 3, 4, 8))
    assert not compact(zeros, 8, 4, 2).starts.any()
    assert not compact(-zeros, 1, 4, 2).starts.any()
    found = compact(zeros.at[1, 2, 3, 5].set(jnp.nan), 8, 4, 1)
    assert np.isnan(found.values[0, 0]).tolist() == [False] * 5 + [True] + [False] * 2
    assert found.positions[0, 0] == 5 * 4 + 3
    assert compact(zeros + 1, 1, 3, 4).starts[0].tolist() == [0, 28, 40]


def test_under_vmap():
    stack = jnp.stack([draw((3, 3), 10, 64, share, seed=1) for share in (0.1, 0.5, 0.0)])
    each = jax.jit(jax.vmap(lambda kernel: kernels.compact(kernel, 1, 4, 2)))(stack)
    for i, kernel in enumerate(stack):
        check([part[i] for part in each], kernel, 1, 4, 2)
