"""Models of packages on PyPI, sparse without a change, against their code with SWAT layers in it.

The oracle is the package itself, where the names ``nn.Conv`` and ``nn.Dense`` (``nnx.Conv`` and
``nnx.Linear``) stand for SWAT layers: what its author would have written.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import evosax.problems.networks
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import lpips_nnx
import mamba2_jax
import numpy as np
import optax
import pytest
import vtransformer
from flax import nnx, traverse_util

import swat_jax
from swat_jax import linen

pytestmark = pytest.mark.newest

SPARSE = {"weight_sparsity": 0.75, "activation_sparsity": 0.5}
REQUEST = {"sparsity": 0.75, "activation_sparsity": 0.5}


class Conv(linen.SwatConv):
    """Named as the stock layer, since Flax calls layers by their class."""

    weight_sparsity: float = 0.75
    activation_sparsity: float | None = 0.5


class Dense(linen.SwatDense):
    weight_sparsity: float = 0.75
    activation_sparsity: float | None = 0.5


def with_other_names(monkeypatch, names, namespace, modules, **layers):
    """Lets ``names`` of a package stand for a namespace in which layers are others."""
    other = types.SimpleNamespace(**{**vars(namespace), **layers})
    for module in modules:
        monkeypatch.setattr(module, names, other)


def identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# ---------- Flax Linen ----------


class Linen(NamedTuple):
    """A module of a package, what it is called with, and how it would be written by hand."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    by_hand: dict[str, Any] = {}  # noqa: RUF012 - arguments of ``make``
    modules: tuple[Any, ...] = ()


def images(*shape):
    return lambda: (jax.random.normal(jax.random.key(1), shape),)


def sequences():
    one, other = jax.random.normal(jax.random.key(1), (2, 2, 5, 32))
    return one, other, jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])


LINEN = {
    "jax_resnet_resnet": Linen(
        functools.partial(
            jax_resnet.ResNet18, n_classes=5, hidden_sizes=(8, 16), stage_sizes=(1, 1)
        ),
        images(2, 16, 16, 3),
        {"conv_cls": Conv},
        (jax_resnet.resnet,),
    ),
    # Split attention, grouped convolutions, and an input that several layers read.
    "jax_resnet_resnest": Linen(
        functools.partial(jax_resnet.ResNeSt50, n_classes=5, hidden_sizes=(16,), stage_sizes=(1,)),
        images(2, 16, 16, 3),
        {
            "conv_cls": Conv,
            "block_cls": functools.partial(
                jax_resnet.ResNeStBottleneckBlock,
                splat_cls=functools.partial(
                    jax_resnet.splat.SplAtConv2d,
                    conv_block_cls=functools.partial(jax_resnet.ConvBlock, conv_cls=Conv),
                ),
            ),
        },
        (jax_resnet.resnet,),
    ),
    "evosax_cnn": Linen(
        functools.partial(
            evosax.problems.networks.CNN,
            num_filters=[8, 16],
            kernel_sizes=[(3, 3), (3, 3)],
            strides=[(1, 1), (2, 2)],
            mlp_layer_sizes=[32, 5],
            output_fn=evosax.problems.networks.identity_output_fn,
        ),
        images(4, 8, 8, 1),
        {},
        (evosax.problems.networks,),
    ),
    # Attention to itself and to another sequence, and a network of two layers.
    "vanilla_transformer": Linen(
        functools.partial(vtransformer.DecoderBlock, emb_dim=32, d_k=8, d_v=8, d_ff=64, n_heads=2),
        sequences,
        {},
        (vtransformer.layers,),
    ),
}


def linen_step(model, variables, inputs):
    """Loss and variables after one step of SGD."""

    @jax.jit
    def step(variables):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss_of(params):
            y, changed = model.apply({"params": params, **rest}, *inputs, mutable=["batch_stats"])
            return jnp.mean(y**2), changed

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, changed), grads = gradient(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return loss, {**rest, **changed, "params": params}

    return step(variables)


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_module_trains_as_if_it_were_written_with_swat_layers(name, monkeypatch):
    case = LINEN[name]
    module, inputs = case.make(), case.inputs()
    variables = jax.jit(module.init)(jax.random.key(0), *inputs)
    model = linen.sparsify(module, **REQUEST)
    identical(jax.jit(model.init)(jax.random.key(0), *inputs), variables)
    # These modules have no kernels but those of Conv and Dense.
    names = {"/".join(path[:-1]) for path in traverse_util.flatten_dict(variables["params"])
             if path[-1] == "kernel"}  # fmt: skip
    assert set(model.per_layer()) == names
    actual = linen_step(model, variables, inputs)
    with_other_names(monkeypatch, "nn", nn, case.modules, Conv=Conv, Dense=Dense)
    by_hand = case.make(**case.by_hand)
    identical(actual, linen_step(by_hand, variables, inputs))
    monkeypatch.undo()
    dense = linen_step(module, variables, inputs)
    assert float(actual[0]) != float(dense[0])
    # Evaluation of the sparse module is that of the package's own module with pruned weights.
    evaluated = model.eval().apply(variables, *inputs)
    np.testing.assert_array_equal(module.apply(model.prune(variables), *inputs), evaluated)


# ---------- Flax NNX ----------


class Nnx(NamedTuple):
    """A model of a package, what it is called with, its loss, and where its layers are named."""

    make: Callable[[], Any]
    inputs: tuple[Any, ...]
    loss: Callable[..., Any]
    modules: tuple[Any, ...]
    layers: int
    filter: str | None = None


def lpips():
    return lpips_nnx.LPIPS(rngs=nnx.Rngs(0))


def mamba():
    config = mamba2_jax.Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=8, head_dim=8, chunk_size=4,
        num_hidden_layers=2, tie_word_embeddings=False,
    )  # fmt: skip
    return mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))


WORDS = jax.random.randint(jax.random.key(1), (2, 8), 0, 50)
PAIR = jax.random.normal(jax.random.key(1), (2, 1, 32, 32, 3))
NNX = {
    # Every conv is called twice, once for each image.
    "lpips_vgg16": Nnx(
        lpips,
        (PAIR[0], PAIR[1]),
        lambda model, *images: jnp.sum(model(*images)),
        (lpips_nnx.vgg, lpips_nnx.netlin),
        18,
    ),
    # Its convolutions are never called: it multiplies with their kernels itself.
    "mamba2": Nnx(
        mamba, (WORDS, WORDS), lambda model, *words: model(*words)["loss"],
        (mamba2_jax.modeling,), 5, "**/*[!v]",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """VGG16 as it is initialised: its weights would come from the network."""
    monkeypatch.setattr(lpips_nnx.VGG16Features, "_load_weights", lambda self: None)


def nnx_step(model, case):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(case.loss)(model, *case.inputs)
        optimizer.update(model, grads)
        return loss

    return step(model, optimizer)


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_model_trains_as_if_it_were_written_with_swat_layers(name, monkeypatch, capsys):
    case = NNX[name]
    given = case.make()
    model = swat_jax.sparsify(given, filter=case.filter, **REQUEST)
    with_other_names(
        monkeypatch, "nnx", nnx, case.modules,
        Conv=nnx.Conv if case.filter else functools.partial(swat_jax.SwatConv, **SPARSE),
        Linear=functools.partial(swat_jax.SwatLinear, **SPARSE),
    )  # fmt: skip
    by_hand = case.make()
    monkeypatch.undo()
    assert nnx.graphdef(model) == nnx.graphdef(by_hand)
    identical(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(by_hand)))
    assert nnx.graphdef(swat_jax.densify(model)) == nnx.graphdef(given)
    assert float(nnx_step(model, case)) == float(nnx_step(by_hand, case))
    identical(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(by_hand)))
    table = swat_jax.summary(model, *case.inputs)
    assert len(table.rows) == case.layers
    assert {row.weight_sparsity for row in table.rows} == {0.75}
    assert table.rows[0].calls == (2 if name == "lpips_vgg16" else 1)
    told = capsys.readouterr().out
    assert f"{case.layers} of them sparse" in told
    assert ("never called: backbone/layers/0/mixer/conv1d/conv" in told) == (name == "mamba2")
    model.eval()
    pruned = swat_jax.densify(model, prune=True)
    np.testing.assert_array_equal(case.loss(pruned, *case.inputs), case.loss(model, *case.inputs))
