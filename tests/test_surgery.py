"""SWAT in NNX models that know nothing of it, against the same models written by hand."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

import swat_jax
from swat_jax import SwatConv, SwatLinear, densify, export, kernels, models, sparsify
from swat_jax.errors import UsageError
from swat_jax.layer_state import Threshold
from tests import oracle
from tests.own_models import LABELS, Net, X, by_hand, stock

SPARSE = {"weight_sparsity": 0.75, "activation_sparsity": 0.5}


def same(one, other):
    """Structure and bits of two models: everything that NNX knows of them."""
    graphs = [nnx.split(model) for model in (one, other)]
    assert graphs[0][0] == graphs[1][0]
    leaves = [nnx.to_flat_state(state) for _, state in graphs]
    for (path, a), (other_path, b) in zip(*leaves, strict=True):
        assert path == other_path
        assert type(a) is type(b)
        if isinstance(a, nnx.Variable):
            assert a.get_metadata() == b.get_metadata()
            a, b = a.get_value(), b.get_value()
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def train(model, steps=3, update=None):
    """The losses of a few steps of SGD in the five lines of a user."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss_of(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), LABELS).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        if update is None:
            optimizer.update(model, grads)
        else:
            update(model, optimizer, grads)
        return loss

    return [float(step(model, optimizer, X * (1 + number))) for number in range(steps)]


# ---------- What comes out is what would be written by hand ----------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "channel"},
        {"granularity": "filter", "threshold_every_steps": 2},
        {"threshold_every_steps": 2},
        {"pack": True},
    ],
    ids=str,
)
def test_it_is_the_model_written_by_hand_and_trains_as_it(options):
    given = stock()
    model = sparsify(given, sparsity=0.75, activation_sparsity=0.5, dense="stem", **options)
    expected = by_hand(**SPARSE, **options)
    same(model, expected)
    same(given, stock())
    losses = train(model)
    assert losses == train(expected)
    assert losses != train(stock())
    same(model, expected)


def test_shared_modules_stay_shared_and_nothing_of_the_given_model_is_in_the_new_one():
    given = stock()
    model = sparsify(given, sparsity=0.5)
    assert model.again is model.block
    assert isinstance(model.again.convs[1], SwatConv)
    assert isinstance(model.heads["a"], SwatLinear)
    mine = {id(module) for _, module in nnx.iter_modules(given)}
    assert not mine & {id(module) for _, module in nnx.iter_modules(model)}
    model.stem.kernel[...] = jnp.zeros_like(model.stem.kernel[...])
    assert np.any(given.stem.kernel[...])


def test_types_metadata_and_sharding_of_variables_stay(fake_devices):
    mesh = jax.sharding.Mesh(np.array(fake_devices[:2]), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    layer = nnx.Conv(
        2, 4, (3, 3), param_dtype=jnp.bfloat16, kernel_metadata={"tag": "mine"}, rngs=nnx.Rngs(0)
    )
    layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), sharding))
    model = sparsify(layer, sparsity=0.5)
    kernel = model.kernel
    assert isinstance(kernel, nnx.Param)
    assert kernel.get_metadata()["tag"] == "mine"
    assert kernel.get_value().dtype == jnp.bfloat16
    assert kernel.get_value().sharding == sharding
    y = nnx.jit(lambda model, x: model(x))(model, jnp.ones((1, 5, 5, 2)))
    np.testing.assert_allclose(
        y, sparsify(layer, sparsity=0.5)(jnp.ones((1, 5, 5, 2))), rtol=2e-2, atol=1e-2
    )


class Narrow(nnx.Conv):
    """A subclass that only chooses arguments."""

    def __init__(self, channels, *, rngs):
        super().__init__(channels, channels, (1, 1), use_bias=False, rngs=rngs)
        self.name = "narrow"

    def norm(self):
        return jnp.sum(jnp.abs(self.kernel[...]))


def test_a_subclass_stays_itself_and_computes_as_a_swat_layer():
    given = Narrow(4, rngs=nnx.Rngs(0))
    model = sparsify(given, sparsity=0.75)
    assert isinstance(model, Narrow)
    assert isinstance(model, SwatConv)
    assert model.name == "narrow"
    assert model.norm() == given.norm()
    plain = SwatConv(4, 4, (1, 1), use_bias=False, weight_sparsity=0.75, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    np.testing.assert_array_equal(model(x), plain(x))
    assert type(sparsify(given, sparsity=0.5)) is type(model)
    same(densify(model), given)


def test_an_own_promotion_of_types_is_obeyed():
    def promote(args, *, dtype=None):
        return tuple(None if arg is None else arg.astype(jnp.float16) for arg in args)

    layer = nnx.Linear(4, 4, promote_dtype=promote, rngs=nnx.Rngs(0))
    model = sparsify(layer, sparsity=0.5)
    assert model.promote_dtype is promote
    assert model(jnp.ones((2, 4))).dtype == jnp.float16


def test_the_call_of_a_stack_of_layers_is_that_of_each():
    @nnx.vmap
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    given = stack(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    def weigh(model):
        return (run(x, model) ** 2).sum()

    model = sparsify(given, sparsity=0.75, activation_sparsity=0.5)
    grads = nnx.grad(weigh)(model).kernel[...]
    layers = []
    for number in range(3):
        layer = SwatLinear(4, 4, **SPARSE, rngs=nnx.Rngs(0))
        nnx.update(layer, jax.tree.map(lambda leaf, n=number: leaf[n], nnx.state(given)))
        layers.append(layer)

    def weigh_all(layers):
        y = x
        for layer in layers:
            y = layer(y)
        return (y**2).sum()

    expected = nnx.grad(weigh_all)(nnx.List(layers))
    for number in range(3):
        np.testing.assert_allclose(grads[number], expected[number].kernel[...], rtol=1e-5)
    kernel = densify(model, prune=True).kernel[...]
    for number in range(3):
        mask = oracle.weight_mask(np.asarray(given.kernel[...][number]), keep=4)
        np.testing.assert_array_equal(kernel[number], given.kernel[...][number] * mask)


class Pair(nnx.Pytree):
    def __init__(self, layer):
        self.layer = layer


@struct.dataclass
class Plain:
    layer: Any


class Containers(nnx.Module):
    """Layers in tuples, dicts and lists, in dataclasses, and within a loop over time."""

    def __init__(self, linear, *, rngs):
        one, two, three, four = (linear(4, 4, rngs=rngs) for _ in range(4))
        self.nested = nnx.data((one, {"list": [two]}))
        self.pair = Pair(three)
        self.plain = nnx.data(Plain(four))
        self.loop = nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs))

    def __call__(self, x):
        x = self.nested[1]["list"][0](self.nested[0](x))
        return self.loop(self.plain.layer(self.pair.layer(x)))


def test_layers_are_found_in_containers_of_all_kinds():
    given = Containers(nnx.Linear, rngs=nnx.Rngs(0))
    model = sparsify(given, sparsity=0.5, filter=lambda path, layer: "loop" not in path)
    same(model, Containers(functools.partial(SwatLinear, weight_sparsity=0.5), rngs=nnx.Rngs(0)))
    model = sparsify(given, sparsity=0.5)
    assert sum(isinstance(m, SwatLinear) for _, m in nnx.iter_modules(model)) == 6
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    plain = densify(model, prune=True)
    np.testing.assert_array_equal(plain(x), model(x))
    assert not np.array_equal(given(x), model(x))


def test_settings_of_layers_by_pattern():
    overrides = {
        "block/**": {"granularity": "channel", "weight_sparsity": 0.5},
        "heads/*": 0.25,
    }
    model = sparsify(
        stock(), sparsity=0.9, distribution="erk", filter=["block/**", "wide", "heads/a"],
        overrides=overrides,
    )  # fmt: skip
    assert type(model.stem) is nnx.Conv
    conv = model.block.convs[1]
    assert (conv.granularity, conv.weight_sparsity, conv.activation_sparsity) == (
        "channel", 0.5, 0.5,
    )  # fmt: skip
    assert (model.heads["a"].weight_sparsity, model.wide.granularity) == (0.25, "unstructured")
    # Alone in the distribution, it meets the whole of it.
    assert model.wide.weight_sparsity == pytest.approx(0.9)


def test_a_filter_may_look_at_the_layer():
    model = sparsify(stock(), sparsity=0.5, filter=lambda path, layer: layer.use_bias is False)
    assert [path for path, _ in swat_jax.build.sparse_layers(model)] == ["heads/a"]


def test_new_settings_for_a_model_that_is_sparse_already():
    model = sparsify(stock(), sparsity=0.5, granularity="channel", threshold_every_steps=3)
    again = sparsify(model, sparsity=0.75, activation_sparsity=0.5, dense="stem")
    same(again, by_hand(**SPARSE))


def test_saved_inputs_are_packed_where_it_is_asked_for_but_not_by_default_under_momentum(
    monkeypatch,
):
    monkeypatch.setattr(kernels, "packs", lambda: True)
    assert sparsify(stock(), sparsity=0.5).wide.pack
    assert not sparsify(stock(), sparsity=0.5, pack=False).wide.pack
    assert not sparsify(stock(), sparsity=0.5, distribution="momentum").wide.pack


# ---------- And back ----------


@pytest.mark.parametrize(
    "options", [{}, {"threshold_every_steps": 2}, {"distribution": "momentum"}]
)
def test_densify_turns_back(options):
    same(densify(sparsify(stock(), sparsity=0.5, **options)), stock())
    same(densify(by_hand(**SPARSE)), stock())
    same(densify(stock()), stock())


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter"])
def test_pruned_stock_layers_compute_what_evaluation_does(granularity, tmp_path):
    model = sparsify(stock(), sparsity=0.75, granularity=granularity, dense="stem")
    train(model)
    plain = densify(model, prune=True)
    assert not any(isinstance(m, SwatConv | SwatLinear) for _, m in nnx.iter_modules(plain))
    kernel = np.asarray(model.wide.kernel[...])
    keep = oracle.keep_count(0.75, oracle.units(kernel.shape, granularity))
    mask = oracle.weight_mask(kernel, keep=keep, granularity=granularity)
    np.testing.assert_array_equal(plain.wide.kernel[...], kernel * mask)
    model.eval()
    plain.eval()
    np.testing.assert_array_equal(plain(X), model(X))
    export.save(tmp_path / "net.safetensors", model)
    fresh = stock(seed=5)
    fresh.eval()
    export.load_into(tmp_path / "net.safetensors", fresh)
    np.testing.assert_array_equal(fresh(X), model(X))


def test_a_network_of_ours_becomes_the_one_of_stock_layers():
    layers = models.LayerTypes(
        functools.partial(SwatConv, weight_sparsity=0.5),
        functools.partial(SwatLinear, weight_sparsity=0.5),
    )
    arguments = {"num_classes": 4, "in_channels": 1}
    network = models.create("resnet8", layers=layers, rngs=nnx.Rngs(0), **arguments)
    same(densify(network), models.create("resnet8", rngs=nnx.Rngs(0), **arguments))


def test_a_stack_along_other_axes_is_not_pruned():
    @functools.partial(nnx.vmap, out_axes=1)
    def stack(key):
        return nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(key))

    model = sparsify(stack(jax.random.split(jax.random.key(0), 3)), sparsity=0.5)
    with pytest.raises(UsageError, match=r"stack of kernels \(4, 5\).*\(4, 3, 5\)"):
        densify(model, prune=True)


# ---------- Modes ----------


def test_evaluation_and_training_as_in_flax():
    model = sparsify(stock(), sparsity=0.5, threshold_every_steps=3)
    convs = [model.stem, model.block.convs[0], model.heads["a"]]
    assert not any(layer.deterministic for layer in convs)
    model.eval()
    assert all(layer.deterministic for layer in convs)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, Threshold)))
    model(X)
    after = nnx.to_pure_dict(nnx.state(model, Threshold))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    model.train()
    assert not any(layer.deterministic for layer in convs)
    viewed = nnx.view(model, deterministic=True, use_running_average=True)
    assert viewed.stem.deterministic
    assert not model.stem.deterministic


# ---------- What cannot be a SWAT layer ----------


class Standardized(nnx.Conv):
    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs - 1, out_sharding)


class OwnProduct(nnx.Linear):
    @property
    def dot_general(self):
        return jax.lax.dot_general

    @dot_general.setter
    def dot_general(self, value):
        pass


def int8(layer):
    layer.kernel = nnx.Param(jnp.ones(layer.kernel.shape, jnp.int8))
    return layer


def double(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


RNGS = nnx.Rngs(0)
REFUSED = {
    "transposed": (nnx.ConvTranspose(2, 2, (3, 3), rngs=RNGS), "ConvTranspose has no SWAT form"),
    "einsum": (nnx.Einsum("a,ab->b", (2, 2), rngs=RNGS), "Einsum has no SWAT form"),
    "general": (nnx.LinearGeneral(2, (2, 2), rngs=RNGS), "LinearGeneral has no SWAT form"),
    "own_call": (Standardized(2, 2, (3, 3), rngs=RNGS), "Standardized has a __call__ of its own"),
    "lora": (nnx.LoRALinear(2, 2, lora_rank=1, rngs=RNGS), "LoRALinear has a __call__"),
    "own_class_product": (OwnProduct(2, 2, rngs=RNGS), "OwnProduct has a dot_general"),
    "own_product": (nnx.Linear(2, 2, dot_general=double, rngs=RNGS), "it has a dot_general"),
    "masked": (
        nnx.Conv(2, 2, (3, 3), mask=jnp.ones((3, 3, 2, 2)), rngs=RNGS), "it has a mask of its own",
    ),
    "integers": (int8(nnx.Linear(2, 2, rngs=RNGS)), "no array of floats"),
    "four_axes": (nnx.Conv(2, 2, (1, 1, 1, 1), rngs=RNGS), "shape (1, 1, 1, 1, 2, 2)"),
    "no_weights": (nnx.Linear(0, 2, kernel_init=nnx.initializers.zeros, rngs=RNGS), "(0, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sparse_stays_and_is_named_with_the_reason(name):
    layer, reason = REFUSED[name]
    given = nnx.Dict({name: layer, "other": nnx.Linear(2, 2, rngs=nnx.Rngs(1))})
    with pytest.warns(UserWarning, match=f"left as they are: {name} ") as told:
        model = sparsify(given, sparsity=0.5)
    assert len(told) == 1
    assert reason in str(told[0].message)
    assert type(model[name]) is type(layer)
    same(model[name], layer)
    assert isinstance(model["other"], SwatLinear)
    with pytest.raises(UsageError, match="no layer that can be sparse"):
        sparsify(layer, sparsity=0.5)
    # Who leaves it out knows of it.
    sparsify(given, sparsity=0.5, filter="other")
    with pytest.warns(UserWarning, match="left as they are"):
        sparsify(given, sparsity=0.5, dense=name)


def test_layers_that_share_a_kernel_stay():
    one, two = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2))
    two.kernel = one.kernel
    tied = nnx.Dict({"one": one, "two": two, "three": nnx.Linear(4, 4, rngs=nnx.Rngs(2))})
    with pytest.warns(UserWarning, match="one, two .it shares its kernel"):
        model = sparsify(tied, sparsity=0.5)
    assert model["two"].kernel is model["one"].kernel
    assert isinstance(model["three"], SwatLinear)


def test_layers_within_a_norm_of_their_weights_stay():
    rngs = nnx.Rngs(0)
    given = nnx.Dict(
        {
            "normed": nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
            "plain": nnx.Linear(4, 4, rngs=rngs),
        }
    )
    with pytest.warns(UserWarning, match="normed/layer_instance .WeightNorm changes its kernel"):
        model = sparsify(given, sparsity=0.5)
    assert isinstance(model["plain"], SwatLinear)


@pytest.mark.parametrize("options", [{"threshold_every_steps": 2}, {"distribution": "momentum"}])
def test_stacks_have_no_state(options):
    @nnx.vmap
    def stack(key):
        return nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(key))

    given = nnx.Dict(
        {
            "stack": stack(jax.random.split(jax.random.key(0), 3)),
            "conv": nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)),
        }
    )
    with pytest.warns(UserWarning, match="stack .it is a stack"):
        model = sparsify(given, sparsity=0.5, **options)
    assert type(model["stack"]) is nnx.Conv
    assert isinstance(model["conv"], SwatConv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(sparsify(given, sparsity=0.5)["stack"], SwatConv)


def test_many_names_are_cut():
    layers = nnx.List([nnx.LinearGeneral(2, (2, 2), rngs=RNGS) for _ in range(12)])
    model = nnx.Dict({"layers": layers, "last": nnx.Linear(2, 2, rngs=RNGS)})
    with pytest.warns(UserWarning, match="layers/9 and 2 more .LinearGeneral has no SWAT form"):
        sparsify(model, sparsity=0.5)


class OwnSwat(SwatConv):
    pass


def test_swat_layers_of_an_own_class_are_left_to_their_maker():
    layer = OwnSwat(2, 2, (1, 1), weight_sparsity=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="OwnSwat is a SWAT layer of its own make"):
        sparsify(layer, sparsity=0.5)
    with pytest.raises(UsageError, match="OwnSwat of the model is not made by sparsify"):
        densify(layer)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nnx.BatchNorm(3, rngs=RNGS), {}, "no nnx.Conv and no nnx.Linear"),
        (stock(), {"sparsity": 1.5}, "sparsity must be"),
        (stock(), {"dense": "stm"}, "did you mean 'stem'"),
        (stock(), {"overrides": {"blck/**": 0.5}}, "no layer fits 'blck/"),
        (stock(), {"filter": lambda path, layer: False}, "filter takes none"),
    ],
)
def test_bad_requests_are_refused(model, options, words):
    with pytest.raises(UsageError, match=words):
        sparsify(model, **{"sparsity": 0.5, **options})


def test_net_is_called_as_it_is_written():
    """The oracle of this file: `Net` at sparsity 0 is stock Flax bit for bit."""
    dense = Net(SwatConv, SwatLinear, SwatConv, rngs=nnx.Rngs(0))
    dense.drop.deterministic = True
    model = stock()
    model.drop.deterministic = True
    np.testing.assert_array_equal(dense(X), model(X))
