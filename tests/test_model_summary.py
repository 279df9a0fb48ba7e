"""The layer table of any model: by hand for a small one, and as `flops` and `kept_bytes` count."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from swat_jax import SwatConv, SwatLinear, flops, kept_bytes, method, models, sparsify, summary
from swat_jax.errors import UsageError
from swat_jax.sparsity import packing, top_k
from tests.models.networks import table
from tests.own_models import stock


class Small(nnx.Module):
    """A conv that is called twice, and a call with more than images."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(3, 5, dtype=jnp.bfloat16, rngs=rngs)
        self.unused = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x, weights, *, twice, scale=None):
        x = self.conv(x)
        x = self.conv(x) if twice else x
        return self.head((x * weights).mean((1, 2))) * scale["by"]


CALL = {"twice": True, "scale": {"by": jnp.float32(2)}}


def test_numbers_by_hand(capsys):
    model = sparsify(Small(nnx.Rngs(0)), sparsity=0.75, activation_sparsity=0.5, dense="head")
    found = summary(model, (2, 8, 8, 3), jnp.ones(3), **CALL)
    conv, head = found.rows
    assert (conv.path, conv.kind, conv.kernel_shape) == ("conv", "conv", (3, 3, 3, 3))
    assert (conv.input_hw, conv.output_hw, conv.calls) == ((8, 8), (4, 4), 2)
    forward = 81 * (16 + 4)
    backward = 81 * (64 + 16)
    assert (conv.weights, conv.macs_forward) == (81, forward)
    assert conv.macs_training == 2 * forward + backward
    assert conv.macs_saved == 0.75 * (forward + backward) + 0.5 * forward
    # float32 inputs of 2x8x8x3 and 2x4x4x3; the weights are the parameter itself.
    assert conv.bytes_dense == 4 * (384 + 96)
    room = [packing.capacity(top_k.keep_count(0.5, size), size) for size in (384, 96)]
    exact = jax.eval_shape(lambda: [packing.pack(jnp.ones(n), jnp.float32(0), r)
                                    for n, r in zip((384, 96), room, strict=True)])  # fmt: skip
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(exact))
    weights = 2 * 81 * 4  # masked ones, for each use
    assert conv.bytes_kept == packed + 2 * 4 + weights
    # bfloat16: 2x3 inputs, and 15 weights that are converted.
    assert (head.bytes_dense, head.bytes_kept, head.weight_sparsity) == (42, 42, 0.0)
    assert (found.weights, found.weight_sparsity) == (96, pytest.approx(0.75 * 81 / 96))
    assert found.bytes_kept == conv.bytes_kept + 42
    text = capsys.readouterr().out
    assert text == f"{found}\n"
    assert re.search(r"^conv x2 .* 3x3x3x3 .* 8x8 .* 4x4 .* 75.0 .* 50.0 ", text, re.MULTILINE)
    assert "never called: unused (SwatLinear)" in text


@pytest.mark.parametrize(
    ("name", "text", "most"),
    [
        ("resnet8", "u90", 0.3),
        ("resnet18", "u90", 0.3),
        # The shortcuts are dense, and keep an input that nobody else keeps any more.
        ("resnet18", "erk90", 0.7),
        # Linear layers keep their masked weights, which have the size of dense ones.
        ("vgg16", "u90", 0.9),
    ],
)
def test_networks_of_ours_come_out_as_flops_and_kept_bytes_count_them(name, text, most):
    config = method.apply(ConfigDict({"sparsity": {}}), text)
    layers = table(name)
    wanted = flops.sparsities(layers, config.sparsity)
    size = layers[0].input_hw[0]
    make = functools.partial(
        models.create, name, num_classes=10, in_channels=layers[0].kernel_shape[-2]
    )
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    first = layers[0].path if text == "u90" else ()
    model = sparsify(model, sparsity=0.9, distribution=wanted_distribution(text), dense=first)
    found = summary(model, (256, size, size, layers[0].kernel_shape[-2]))
    assert [row.path for row in found.rows] == list(dict.fromkeys(x.path for x in layers))
    for row in found.rows:
        assert row.weight_sparsity == pytest.approx(wanted.weight[row.path], abs=1e-12)
    reduction = flops.training_flop_reduction(layers, wanted.weight, wanted.activation)
    assert 100 * found.training_reduction == pytest.approx(reduction)
    dense = kept_bytes.trace(
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))),
        (256, size, size, layers[0].kernel_shape[-2]),
    )
    products = [x for x in dense if x.kind in ("conv", "linear")]
    assert found.bytes_dense == sum(x.activations + x.weights for x in products)
    assert found.bytes_kept < most * found.bytes_dense


def wanted_distribution(text):
    return "erk" if text.startswith("erk") else "uniform"


def test_a_dense_model_saves_nothing(capsys):
    found = summary(stock(), (2, 8, 8, 3))
    assert found.training_reduction == found.weight_sparsity == 0
    assert found.bytes_kept == found.bytes_dense
    assert "5 conv and linear layers, 0 of them sparse" in capsys.readouterr().out
    # Two uses of each shared conv, under the first name.
    assert [row.calls for row in found.rows] == [1, 2, 2, 1, 1]


def test_a_model_stays_as_it_is():
    model = sparsify(stock(), sparsity=0.5, threshold_every_steps=2)
    before = nnx.graphdef(model)
    summary(model, (2, 8, 8, 3))
    assert nnx.graphdef(model) == before
    assert int(model.wide.threshold_age[...]) == 0
    assert not model.wide.pack


def test_inputs_of_other_kinds():
    class Tokens(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.head = nnx.Linear(8, 11, rngs=rngs)

        def __call__(self, batch):
            return self.head(self.embed(batch["tokens"]))

    batch = {"tokens": jax.ShapeDtypeStruct((2, 7), jnp.int32)}
    (row,) = summary(Tokens(nnx.Rngs(0)), batch).rows
    assert (row.input_hw, row.macs_forward, row.bytes_dense) == ((7,), 7 * 88, 2 * 7 * 8 * 4)


def test_a_stack_of_layers_counts_as_all_of_them():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(3))

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.layers)

    model = sparsify(Stack(nnx.Rngs(0)), sparsity=0.5)
    (row,) = summary(model, (2, 4)).rows
    assert (row.weights, row.calls, row.macs_forward, row.bytes_dense) == (48, 3, 48, 3 * 32)
    assert row.weight_sparsity == 0.5


def test_budgets_that_have_moved():
    model = sparsify(stock(), sparsity=0.75, distribution="momentum")
    model.wide.weight_budget[...] = jnp.int32(144)
    rows = {row.path: row for row in summary(model, (2, 8, 8, 3)).rows}
    assert rows["wide"].weight_sparsity == rows["wide"].activation_sparsity == 0.75
    model.wide.weight_budget[...] = jnp.int32(288)
    rows = {row.path: row for row in summary(model, (2, 8, 8, 3)).rows}
    assert rows["wide"].weight_sparsity == 0.5


def test_what_is_not_in_the_table_is_said(capsys):
    class Other(nnx.Module):
        def __init__(self, rngs):
            self.general = nnx.LinearGeneral(4, (2, 2), rngs=rngs)
            self.linear = SwatLinear(4, 4, weight_sparsity=0.5, pack=False, rngs=rngs)

        def __call__(self, x):
            return self.general(self.linear(x))

    summary(Other(nnx.Rngs(0)), (2, 4))
    told = capsys.readouterr().out
    assert "not counted: general (LinearGeneral)" in told
    assert "do not pack their inputs here" in told
    with pytest.raises(UsageError, match=r"reaches no nnx\.Conv"):
        summary(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), (2, 3))
    with pytest.raises(UsageError, match=r"input_shape: \(\) is empty; give \(N, "):
        summary(Other(nnx.Rngs(0)), ())


def test_a_layer_alone(capsys):
    layer = SwatConv(3, 4, (3, 3), weight_sparsity=0.5, rngs=nnx.Rngs(0))
    (row,) = summary(layer, (1, 4, 4, 3)).rows
    assert row.path == ""
    assert capsys.readouterr().out.splitlines()[1].startswith("(the model)")
