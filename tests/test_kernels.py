"""The choice between kernels and their twins; that training lowers to kernels for a GPU.

What kernels compute is tested on a GPU, in tests/gpu. Here no program runs on one, but it can be
lowered for one wherever the library is built: `SWAT_JAX_LIBRARY`, or an installation with nvcc.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import functional, kernels, native
from swat_jax.algorithms import Algorithms
from swat_jax.errors import UsageError
from swat_jax.kernels import choice
from swat_jax.layers import SwatConv
from tests import oracle
from tests.runs import needs_library


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setenv("SWAT_JAX_BACKEND", "cuda")
    assert kernels.backend() == "cuda"


def lowered(function, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def test_without_a_gpu_the_twins_are_used(monkeypatch):
    monkeypatch.delenv("SWAT_JAX_BACKEND", raising=False)
    assert kernels.backend() == "xla"
    assert not kernels.packs()


@pytest.mark.parametrize("name", ["gpu", "CUDA", "xla,cuda"])
def test_an_unknown_backend_is_refused(monkeypatch, name):
    monkeypatch.setenv("SWAT_JAX_BACKEND", name)
    with pytest.raises(UsageError, match="SWAT_JAX_BACKEND must be one of cuda, xla; got"):
        kernels.threshold(jnp.ones(8), 2)


def test_cuda_without_the_library_is_refused(monkeypatch):
    monkeypatch.setenv("SWAT_JAX_BACKEND", "cuda")
    absent = native.Status(False, "the kernels were not built")
    monkeypatch.setattr(native, "load", lambda: absent)
    with pytest.raises(UsageError, match="SWAT_JAX_BACKEND is cuda, but the kernels were not"):
        kernels.backend()


@needs_library
def test_an_unknown_op_is_refused(cuda, monkeypatch):
    monkeypatch.setenv("SWAT_JAX_XLA_OPS", "pack,sort")
    with pytest.raises(UsageError, match=r"SWAT_JAX_XLA_OPS must hold names of .* got 'sort'"):
        kernels.threshold(jnp.ones(8), 2)


@needs_library
@pytest.mark.parametrize("every", [1, 2])
def test_the_gradient_of_a_layer_lowers_to_kernels(cuda, every):
    layer = SwatConv(
        4, 8, (3, 3), weight_sparsity=0.5, threshold_every_steps=every, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params, rest, copy=True)(x) ** 2)

    text = lowered(jax.grad(loss), params, jnp.ones((2, 8, 8, 4), jnp.bfloat16))
    assert "swat_jax_threshold" in text


@needs_library
def test_the_gradient_of_batch_norm_lowers_to_kernels(cuda, monkeypatch):
    x, scale, bias = jnp.ones((2, 4, 4, 24), jnp.bfloat16), jnp.ones(24), jnp.zeros(24)
    kernel = jnp.ones((3, 3, 24, 8), jnp.float32)
    selection = kernels.Selection(jnp.array([[0, 70]], jnp.uint32), 80)

    def loss(x, kernel):
        out = functional.batch_norm_relu(x, scale, bias, selection=selection)
        assert out.thresholds is not None
        kept = {"packed": out.packed, "activation_threshold": out.thresholds[0]}
        y = functional.swat_conv(out.y[0], kernel, weight_sparsity=0.5, **kept)
        return jnp.sum(y.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1)), x, kernel)
    for op in ("statistics", "relu", "gradient_sums", "gradient"):
        assert f"swat_jax_batch_norm_{op}" in text
    assert "swat_jax_unpack" in text
    monkeypatch.setenv("SWAT_JAX_XLA_OPS", "batch_norm")
    text = lowered(jax.grad(loss, (0, 1)), x, kernel)
    assert "swat_jax_batch_norm" not in text
    assert "swat_jax_unpack" in text


@needs_library
def test_a_weight_gradient_lowers_to_its_kernel(cuda, monkeypatch):
    x, kernel = jnp.ones((2, 4, 4, 24), jnp.bfloat16), jnp.ones((1, 1, 24, 8))

    def loss(x, kernel):
        y = functional.swat_conv(
            x, kernel, weight_sparsity=0.5, activation_sparsity=0.5, capacity=400,
            algorithms=Algorithms(weight_gradient="sparse"),
        )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1)), x, kernel)
    assert "swat_jax_sparse_conv_weight_gradient" in text
    assert "swat_jax_unpack" not in text
    monkeypatch.setenv("SWAT_JAX_XLA_OPS", "sparse_conv")
    text = lowered(jax.grad(loss, (0, 1)), x, kernel)
    assert "swat_jax_sparse_conv" not in text


@needs_library
def test_on_the_cpu_a_program_with_kernels_computes_as_one_without(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (500,))

    def both(x):
        limit = kernels.threshold(x, 50)
        return limit, kernels.unpack(kernels.pack(x, limit, 60), 1.5)

    found = []
    for backend in ("xla", "cuda"):
        monkeypatch.setenv("SWAT_JAX_BACKEND", backend)
        found.append(jax.jit(lambda x: both(x))(x))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_thresholds_that_would_keep_more_than_fits_are_refreshed_early(factor):
    x = jax.random.normal(jax.random.key(0), (400,))
    exact = oracle.threshold(np.asarray(x), 40)
    stored = jnp.array([exact * factor])
    selection = kernels.Selection(jnp.array([[0, 40]], jnp.uint32), 44, jnp.bool_(False), stored)
    packed, limits = jax.jit(kernels.select)(x, selection)
    assert limits[0] == exact
    assert int(jnp.sum(packed.values != 0)) == 40
    assert int(packed.overflow) == 0


def test_what_is_kept_is_never_more_than_fits():
    x = jax.random.normal(jax.random.key(0), (400,))
    for words in ([0, 100], [1, 0]):
        selection = kernels.Selection(jnp.array([words], jnp.uint32), 44)
        packed, limits = jax.jit(kernels.select)(x, selection)
        assert limits[0] == oracle.threshold(np.asarray(x), 44)
        assert int(packed.overflow) == 0


@pytest.mark.parametrize("backend", ["xla", "cuda"])
def test_gradients_of_weights_are_settled_for_gpus_only(backend, monkeypatch):
    """Elsewhere a barrier would round what XLA need not round."""
    monkeypatch.setattr(choice, "backend", lambda: backend)
    dw = jnp.arange(12.0).reshape(2, 3, 2)
    # A new function each time: JAX remembers what it traced.
    traced = jax.make_jaxpr(lambda dw: kernels.settled_gradient(dw))(dw)
    assert ("optimization_barrier" in str(traced)) == (backend == "cuda")
    np.testing.assert_array_equal(kernels.settled_gradient(dw), dw)
