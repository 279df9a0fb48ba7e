"""What stands between the layers is recognised or left alone, and the report says which."""

import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from swat_jax import SwatConv, SwatLinear, fuse
from swat_jax.dropout import Dropout
from tests.fusion import training

SPARSE = training.REUSED | {"pack": True}
ALONE = "one pass of batch norm"
FIRST = "its features are on axis 1 of 4, not on the last of several"
WHOLE = "one pass of batch norm, relu"


class Net(nnx.Module):
    """Layers by name and what is done with them."""

    def __init__(self, forward, **layers):
        self.forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        return self.forward(self, x)


def conv(inputs, outputs, **options):
    options = SPARSE | {"param_dtype": jnp.float64} | options
    return SwatConv(inputs, outputs, (3, 3), rngs=nnx.Rngs(inputs), **options)


def norm(channels, **options):
    return nnx.BatchNorm(channels, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def plain(forward, norm_options=(), **options):
    """conv1, norm, conv2 of which a case may change the options."""
    return lambda: Net(
        forward, conv1=conv(3, 8), norm=norm(8, **dict(norm_options)), conv2=conv(8, 8, **options)
    )


def usual(model, x):
    return model.conv2(nnx.relu(model.norm(model.conv1(x))))


def with_mask(model, x):
    return model.conv2(nnx.relu(model.norm(model.conv1(x), mask=x[..., :1] > 0)))


def frozen(model, x):
    return model.conv2(nnx.relu(model.norm(model.conv1(x), use_running_average=True)))


def two_readers(model, x):
    y = model.norm(model.conv1(x))
    return model.conv2(nnx.relu(y)) + jnp.sin(y)


def dense_beside(model, x):
    y = nnx.relu(model.norm(model.conv1(x)))
    return model.conv2(y) + jnp.sin(y)


def read_by_nobody(model, x):
    y = model.conv1(x)
    model.norm(y)
    return y


def used_twice(model, x):
    y = nnx.relu(model.norm(model.conv1(x)))
    return model.conv2(nnx.relu(model.norm(model.conv2(y))))


def averages_needed_early(model, x):
    y = model.conv1(x)
    first = model.norm(y)
    return model.conv2(nnx.relu(first + nnx.relu(model.norm(model.conv2(y)))))


def averages_in_the_result(model, x):
    y = usual(model, x)
    return y * jnp.mean(model.norm.mean[...])


def residual_first(model, x):
    y = model.conv1(x)
    return model.conv2(nnx.relu(y + model.norm(y)))


def remat(model, x):
    return nnx.remat(usual)(model, x)


def compiled(model, x):
    return model.conv2(nnx.jit(lambda model, x: nnx.relu(model.norm(model.conv1(x))))(model, x))


def either(model, x):
    return nnx.cond(jnp.sum(x) > 0, usual, usual, model, x)


def differentiated(model, x):
    graph, state = nnx.split(model.norm)
    inner = jax.grad(lambda x: jnp.sum(jnp.sin(nnx.merge(graph, state, copy=True)(x))))
    return inner(model.conv1(x))


def mapped(model, x):
    graph, state = nnx.split(model.norm)
    one = jax.vmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="batch")
    return nnx.relu(one(model.conv1(x)[:, None])[:, 0])


def flattened():
    def forward(model, x):
        return model.head(nnx.relu(model.norm(model.conv1(x))).reshape(len(x), -1))

    options = {"weight_sparsity": 0.5, "pack": True, "param_dtype": jnp.float64}
    head = SwatLinear(8 * 64, 5, rngs=nnx.Rngs(1), **options)
    return Net(forward, conv1=conv(3, 8), norm=norm(8), head=head)


def dropped():
    def forward(model, x):
        return model.conv2(model.dropout(nnx.relu(model.norm(model.conv1(x)))))

    dropout = nnx.Dropout(0.3, rngs=nnx.Rngs(5))
    return Net(forward, conv1=conv(3, 8), norm=norm(8), conv2=conv(8, 8), dropout=dropout)


def measured():
    model = plain(usual)()
    model.set_attributes(measure=True, raise_if_not_found=False)
    return model


def repeated():
    @nnx.vmap(in_axes=0)
    def blocks(key):
        layer = SwatConv(8, 8, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(key), **SPARSE)
        return Net(lambda self, x: nnx.relu(self.norm(self.conv(x)) + x), conv=layer, norm=norm(8))

    def forward(model, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(model.conv1(x), model.blocks)

    keys = jax.random.split(jax.random.key(0), 3)
    return Net(forward, conv1=conv(3, 8), blocks=blocks(keys))


def own_input(maker, why=""):
    return f"conv2: packs its own input, which is the result of `{maker}`{why}"


# The network, what the report says of its norms (after name and shape) and in its other lines.
CASES = {
    "usual": (plain(usual), [f"{WHOLE}; packs for conv2"], []),
    "exact": (plain(usual, threshold_every_steps=2), [f"{WHOLE}; packs for conv2"], []),
    "jnp.maximum": (
        plain(lambda model, x: model.conv2(jnp.maximum(0, model.norm(model.conv1(x))))),
        [f"{WHOLE}; packs for conv2"],
        [],
    ),
    "no scale, no bias": (
        plain(usual, {"use_scale": False, "use_bias": False}),
        [f"{WHOLE}; packs for conv2"],
        [],
    ),
    "momentum, epsilon": (
        plain(usual, {"momentum": 0.3, "epsilon": 0.1}),
        [f"{WHOLE}; packs for conv2"],
        [],
    ),
    "tanh": (
        plain(lambda model, x: model.conv2(jnp.tanh(model.norm(model.conv1(x))))),
        [f"{ALONE}; dense for tanh; no ReLU, its result is read by `tanh`"],
        [own_input("tanh")],
    ),
    "two readers": (
        plain(two_readers),
        [f"{ALONE}; dense for relu, sin; no ReLU, its result is read by `relu`, `sin`"],
        [own_input("relu")],
    ),
    "dense beside": (plain(dense_beside), [f"{WHOLE}; packs for conv2; dense for sin"], []),
    "reshape": (
        flattened,
        [f"{WHOLE}; dense for reshape"],
        ["head: packs its own input, which is the result of `reshape`"],
    ),
    "read by nobody": (plain(read_by_nobody), ["left as it is; nobody reads its result"], []),
    "used twice": (plain(used_twice), [f"{WHOLE}; packs for conv2"] * 2, []),
    "averages needed early": (
        plain(averages_needed_early),
        [
            f"{ALONE}; dense for add; its running averages are read before the ReLU",
            f"{WHOLE}; dense for add",
        ],
        [own_input("conv1"), own_input("relu")],
    ),
    "averages in the result": (
        plain(averages_in_the_result),
        ["left as it is; its running averages are read by `reduce_sum`"],
        [
            own_input("relu"),
            "norm: left as it is, since its running averages are read by `reduce_sum`",
        ],
    ),
    "residual first": (
        plain(residual_first),
        ["one pass of batch norm, addition, relu; packs for conv2"],
        [],
    ),
    "frozen": (plain(frozen), [f"{WHOLE}; packs for conv2"], []),
    "features first": (
        plain(usual, {"axis": 1}),
        [f"left as it is; {FIRST}"],
        [
            own_input("relu"),
            f"norm: left as it is, since {FIRST}",
        ],
    ),
    "mask": (
        plain(with_mask),
        ["left as it is; it has a mask"],
        [own_input("relu"), "norm: left as it is, since it has a mask"],
    ),
    "circular padding": (
        plain(usual, padding="CIRCULAR"),
        [f"{WHOLE}; dense for conv2"],
        [own_input("relu", "; it pads its input itself (CIRCULAR)")],
    ),
    "other type": (
        plain(usual, dtype=jnp.float32),
        [f"{WHOLE}; dense for conv2"],
        [own_input("relu", "; it computes in float32 and reads float64")],
    ),
    "nothing packed": (plain(usual, pack=False), [f"{WHOLE}; dense for conv2"], []),
    "dropout": (dropped, ["one pass of batch norm, relu, dropout; packs for conv2"], []),
    "measured": (measured, [f"{WHOLE}; packs for conv2"], []),
    "checkpoint": (plain(remat), [f"{WHOLE}; packs for SwatConv 2"], []),
    "compiled": (plain(compiled), [f"{WHOLE}; packs for conv2"], []),
    "scan": (
        repeated,
        ["one pass of batch norm, addition, relu; dense for the result of the function"],
        [],
    ),
    "cond": (plain(either), [], ["layers within `cond` are left as they are"]),
    "differentiated": (
        plain(differentiated),
        [],
        ["BatchNorm 1: left as it is, since it is differentiated within the function"],
    ),
    "mapped": (
        plain(mapped, {"axis_name": "batch"}),
        [],
        ["BatchNorm 1: left as it is, since it is mapped by jax.vmap within the function"],
    ),
}
# The others differ from these in what is made of a jaxpr, not in what JAX may have put there.
ON_EVERY_VERSION = {
    *("usual", "jnp.maximum", "two readers", "residual first", "dropout", "checkpoint"),
    *("compiled", "scan", "cond", "differentiated", "mapped"),
}
assert set(CASES) >= ON_EVERY_VERSION
SHAPE = "4x8x8x8"
# Thresholds that are exact, see `training.REUSED`: found, reused, and found again.
EAGER = {"exact": {"compiled": False, "steps": 3}, "reshape": {"compiled": False}}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ON_EVERY_VERSION else pytest.param(name, marks=pytest.mark.newest)
        for name in CASES
    ],
)
def test_what_is_found_and_what_it_computes(name, caplog):
    build, norms, others = CASES[name]
    options = EAGER.get(name, {})
    with jax.enable_x64(True), caplog.at_level(logging.INFO, "swat_jax.fuse"):
        fused, x = fuse(training.sum_of_squares), training.images(4, 8, 8, 3)
        found = training.train(build, fused, x, **options)
        training.assert_same(found, training.train(build, training.sum_of_squares, x, **options))
    summary, *lines = str(fused.report).splitlines()
    assert [line.partition(f" ({SHAPE}): ")[2] for line in lines[: len(norms)]] == norms
    assert lines[len(norms) :] == others
    # The log has the summary, and as a warning what could have been fused; each once.
    assert [record.getMessage() for record in caplog.records] == [
        f"fuse: {line}" for line in (summary, *fused.report.lost)
    ]
    assert [record.levelname for record in caplog.records][1:] == ["WARNING"] * len(
        fused.report.lost
    )


def test_evaluation_is_left_as_it_is():
    with jax.enable_x64(True):
        model = training.prepared(plain(usual)())
        model.eval()
        before = nnx.to_pure_dict(nnx.state(model))
        x, fused = training.images(4, 8, 8, 3), fuse(usual)
        expected = usual(model, x)
        assert (fused(model, x) == expected).all()
    (only,) = fused.report.norms
    assert only.why == "it is in evaluation mode and no layer packs its result"
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), before, nnx.to_pure_dict(nnx.state(model)))
    )


def test_our_dropout_draws_as_in_our_own_networks():
    """Half of what passes ReLU is dropped, and the gradient passes through the rest alone."""

    def forward(model, x):
        return model.dropout(nnx.relu(model.norm(x)))

    model = Net(
        forward, norm=nnx.BatchNorm(8, rngs=nnx.Rngs(0)), dropout=Dropout(0.5, rngs=nnx.Rngs(5))
    )
    x, fused = jax.random.normal(jax.random.key(0), (64, 64, 8)), fuse(forward)
    y, pull = jax.vjp(lambda bias: _with_bias(fused, model, bias, x), jnp.zeros(8))
    kept = y > 0
    assert 0.24 < jnp.mean(kept) < 0.26
    (gradient,) = pull(jnp.ones_like(y))
    assert jnp.allclose(gradient, 2 * jnp.sum(kept, axis=(0, 1)))
    assert fused.report.norms[0].fused == ("batch norm", "relu", "dropout")


def _with_bias(fused, model, bias, x):
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state, copy=True)
    copy.norm.bias[...] = bias
    return fused(copy, x)
