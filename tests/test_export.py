"""Sparse networks to take home: from models and runs, into models, to scores and predictions."""

import functools
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import (
    SwatConv,
    build,
    config_file,
    evaluate,
    export,
    network,
    predict,
    sparse_file,
    train,
)
from swat_jax.errors import UsageError
from swat_jax.layer_state import WeightBudget
from swat_jax.layers import SwatLinear
from tests.runs import digits


class Net(nnx.Module):
    """A list, a nested module, batch norm and dropout; layers of any make."""

    def __init__(self, conv, linear, *, rngs):
        self.convs = nnx.List([conv(3, 8, (3, 3), rngs=rngs), conv(8, 8, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = linear(8, 5, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(self.norm(conv(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


def swat(seed=0, **options):
    options = {"weight_sparsity": 0.75, **options}
    model = Net(
        functools.partial(SwatConv, **options),
        functools.partial(SwatLinear, **options),
        rngs=nnx.Rngs(seed),
    )
    model.norm.mean[...] = jnp.linspace(-1, 1, 8)
    return model


def stock(seed=1):
    return Net(nnx.Conv, nnx.Linear, rngs=nnx.Rngs(seed))


X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


@pytest.mark.parametrize("granularity", ["unstructured", "channel"])
def test_a_file_computes_what_the_model_computes_in_stock_and_in_swat_layers(tmp_path, granularity):
    model, path = swat(), tmp_path / "net.safetensors"
    if granularity != "unstructured":
        model.convs[0].granularity = granularity
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    export.save(path, model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    expected = model(X)
    for other in (stock(), swat(seed=2)):
        other.eval()
        assert not np.allclose(other(X), expected)
        export.load_into(path, other)
        np.testing.assert_array_equal(other(X), expected)
    tree = export.load(path)
    kernel = tree["params"]["convs"]["1"]["kernel"]
    assert np.count_nonzero(kernel) == kernel.size // 4
    np.testing.assert_array_equal(tree["batch_stats"]["norm"]["mean"], model.norm.mean[...])
    held = sparse_file.read(path)
    assert held.sparse == {f"params/{name}/kernel" for name in ("convs/0", "convs/1", "head")}


def test_weights_keep_the_type_of_the_model(tmp_path):
    path = tmp_path / "net.safetensors"
    export.save(path, swat(), values="bfloat16")
    model = stock()
    model.head.kernel = nnx.Param(model.head.kernel[...].astype(jnp.float16))
    export.load_into(path, model)
    assert model.head.kernel[...].dtype == jnp.float16
    assert model.convs[0].kernel[...].dtype == jnp.float32


def test_a_layer_alone_and_a_model_without_sparse_layers(tmp_path):
    path = tmp_path / "one.safetensors"
    layer = SwatConv(3, 4, (3, 3), weight_sparsity=0.5, rngs=nnx.Rngs(0))
    export.save(path, layer)
    assert np.count_nonzero(export.load(path)["params"]["kernel"]) == 54
    model = stock()
    export.save(path, model)
    assert sparse_file.read(path).sparse == set()
    other = stock(seed=5)
    export.load_into(path, other)
    np.testing.assert_array_equal(other(X), model(X))


def test_a_budget_becomes_that_of_the_file(tmp_path):
    path = tmp_path / "one.safetensors"
    sparse = {"weight_sparsity": 0.9, "activation_sparsity": 0.9, "dynamic_budget": True}
    layers = [SwatConv(3, 4, (3, 3), rngs=nnx.Rngs(seed)) for seed in range(2)]
    for layer in layers:
        layer.set_sparsity(**sparse)
    layers[0].weight_budget = nnx.data(WeightBudget(jnp.int32(40)))
    export.save(path, layers[0])
    export.load_into(path, layers[1])
    budgets = network.collection(layers[1], WeightBudget)
    assert int(budgets["weight_budget"]) == 40


def test_a_budget_counts_units_of_the_granularity(tmp_path):
    path = tmp_path / "one.safetensors"
    layers = [
        SwatConv(4, 8, (3, 3), granularity="channel", rngs=nnx.Rngs(seed)) for seed in range(2)
    ]
    for layer, keep in zip(layers, (16, 3), strict=True):
        layer.set_sparsity(weight_sparsity=0.9, activation_sparsity=0.9, dynamic_budget=True)
        layer.weight_budget = nnx.data(WeightBudget(jnp.int32(keep)))
    export.save(path, layers[0])
    export.load_into(path, layers[1])
    assert int(network.collection(layers[1], WeightBudget)["weight_budget"]) == 16


def test_stored_thresholds_are_not_used_for_other_weights(tmp_path):
    path = tmp_path / "one.safetensors"
    layers = [
        SwatConv(3, 4, (3, 3), weight_sparsity=0.5, threshold_every_steps=10, rngs=nnx.Rngs(seed))
        for seed in range(2)
    ]
    layers[0].kernel[...] = 1e-3 * layers[0].kernel[...]
    export.save(path, layers[0])
    layers[1](X)
    export.load_into(path, layers[1])
    trained = layers[1](X)
    layers[1].eval()
    np.testing.assert_array_equal(trained, layers[1](X))
    assert jnp.any(trained != 0)


def stacked():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return SwatLinear(4, 4, weight_sparsity=0.5, rngs=rngs)

    return make(nnx.Rngs(0))


def masked():
    return SwatConv(3, 4, (3, 3), mask=jnp.ones((3, 3, 3, 4)), rngs=nnx.Rngs(0))


def tied():
    model = swat()
    model.convs.append(SwatConv(8, 8, (3, 3), weight_sparsity=0.75, rngs=nnx.Rngs(9)))
    model.convs[2].kernel = model.convs[1].kernel
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [(stacked, "stack of layers"), (masked, "mask of its own"), (tied, "shares its kernel")],
)
def test_layers_whose_masks_are_not_their_kernels_are_refused(tmp_path, make, told):
    with pytest.raises(UsageError, match=f"model: the SWAT layer .* {told}"):
        export.save(tmp_path / "file", make())
    assert not (tmp_path / "file").exists()


def test_a_layer_that_is_used_twice_is_written_once(tmp_path):
    model, other = swat(), swat(seed=3)
    for one in (model, other):
        one.convs.append(one.convs[1])
        one.eval()
    export.save(tmp_path / "file", model)
    export.load_into(tmp_path / "file", other)
    np.testing.assert_array_equal(other(X), model(X))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("kernel", "no weight of a network"),
        ("params", "no weight of a network"),
        ("other/kernel", "no weight of a network"),
        ("params/" + "a/" * 100_000 + "b", "no weight of a network"),
    ],
)
def test_names_that_no_network_has_are_refused(tmp_path, name, told):
    sparse_file.write(tmp_path / "file", {name: np.ones(3, np.float32)})
    with pytest.raises(UsageError, match=told):
        export.load(tmp_path / "file")


@pytest.mark.parametrize("names", [("params/a", "params/a/b"), ("params/a/b", "params/a")])
def test_arrays_within_arrays_are_refused(tmp_path, names):
    sparse_file.write(tmp_path / "file", dict.fromkeys(names, np.ones(3, np.float32)))
    with pytest.raises(UsageError, match="inside"):
        export.load(tmp_path / "file")


def test_a_file_of_another_network_changes_nothing(tmp_path):
    path = tmp_path / "net.safetensors"
    export.save(path, swat())
    model = stock()
    model.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(UsageError, match="it lacks params/extra/bias, params/extra/kernel"):
        export.load_into(path, model)
    del model.extra
    model.head = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match=r"head/bias has the shape \(5,\), and \(6,\) in"):
        export.load_into(path, model)
    del model.head
    with pytest.raises(UsageError, match="it has, and the network has not, params/head/bias"):
        export.load_into(path, model)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, {k: before[k] for k in after}, after)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    config = digits(max_steps=66)  # the program is that of other tests
    result = train.train_and_evaluate(config, folder / "run")
    assert export.main([str(folder / "run"), str(folder / "pruned.safetensors")]) == 0
    return folder, config, result


FLAGS = ["--config=configs/digits.py:u90", "--config.devices=1"]


def test_a_run_scores_the_same_from_its_file(run, capsys):
    folder, config, result = run
    weights = folder / "pruned.safetensors"
    found = evaluate.evaluate(weights, config)
    assert found["accuracy"] == result["pruned_test_accuracy"]
    assert found["top5_accuracy"] == result["pruned_test_top5_accuracy"]
    assert evaluate.main([f"--weights={weights}", "--json", *FLAGS]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["pruned_test_accuracy"]
    facts = sparse_file.read(weights).facts
    assert facts["pruned_test_accuracy"] == result["pruned_test_accuracy"]
    assert facts["config"] == json.loads((folder / "run" / "config.json").read_text())
    # A bit for each weight, four bytes for each tenth, and the first conv and the rest whole.
    assert weights.stat().st_size < 0.25 * 4 * 172_824


def test_values_are_rounded_where_the_file_would_be_too_large(run, capsys):
    folder, config, result = run
    whole = (folder / "pruned.safetensors").stat().st_size
    for most, expected in ((whole / 2**20 + 1, ""), (whole / 2**20 - 0.001, ", bfloat16")):
        small = folder / "small.safetensors"
        assert export.main([str(folder / "run"), str(small), f"--most_mib={most}"]) == 0
        assert capsys.readouterr().out.endswith(f"MiB{expected}\n")
        assert (small.stat().st_size < whole) == bool(expected)
    before = small.read_bytes()
    assert export.main([str(folder / "run"), str(small), "--most_mib=0.01"]) == 2
    assert "--most_mib 0.01 cannot be met" in capsys.readouterr().err
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.glob("*.part")] == []
    assert evaluate.evaluate(small, config)["accuracy"] == pytest.approx(
        result["pruned_test_accuracy"], abs=0.02
    )


def test_a_file_can_be_written_anew(run, tmp_path, capsys):
    """What comes out is that of the run, rounded: by NumPy, to the nearest, ties to even."""
    folder, _, _ = run
    source, small = folder / "pruned.safetensors", tmp_path / "small.safetensors"
    assert export.main([str(source), str(small), "--values=bfloat16", "--json"]) == 0
    size = small.stat().st_size
    told = {"file": str(small), "bytes": size, "values": "bfloat16"}
    assert json.loads(capsys.readouterr().out) == told
    before, after = (sparse_file.read(path) for path in (source, small))
    assert (after.sparse, after.facts) == (before.sparse, before.facts)
    for name, array in before.arrays.items():
        bits = array.view(np.uint32).astype(np.uint64)
        if name in before.sparse:
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        np.testing.assert_array_equal(after.arrays[name].view(np.uint32), bits)
    assert size < 0.75 * source.stat().st_size
    assert export.main([str(source), str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_predictions_are_those_of_the_network(run, tmp_path, capsys):
    from sklearn.datasets import load_digits

    folder, _, result = run
    data = load_digits()
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        cv2.imwrite(str(paths[-1]), np.round(data.images[number] * 255 / 16).astype(np.uint8))
    weights = str(folder / "pruned.safetensors")
    found = predict.predict(folder / "pruned.safetensors", paths)
    hits = np.mean([one[0][0] == str(data.target[n]) for n, one in enumerate(found)])
    assert hits >= result["pruned_test_accuracy"] - 0.15
    # The same network of stock layers, by hand.
    config = config_file.load("configs/digits.py:u90")
    model = build.build_dense(config, num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    export.load_into(folder / "pruned.safetensors", model)
    model.eval()
    images = np.round(data.images[:40] * 255 / 16)[..., None]
    inputs = jnp.asarray((images / 255 - config.data.mean[0]) / config.data.std[0], jnp.float32)
    shares = np.asarray(jax.nn.softmax(model(inputs)))
    for one, row in zip(found, shares, strict=True):
        assert [name for name, _ in one] == [str(label) for label in np.argsort(-row)[:5]]
        np.testing.assert_allclose([share for _, share in one], np.sort(row)[::-1][:5], atol=1e-5)
    for one in found:
        shares = [share for _, share in one]
        assert len(one) == 5
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.0001
    assert predict.main(["--weights", weights, *map(str, paths[:2])]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in out] == [str(path) for path in paths[:2]]
    assert out[0].split(": ")[1].startswith(f"{found[0][0][0]} {found[0][0][1]:.1%}, ")
    assert predict.main(["--weights", weights, "--json", str(paths[0])]) == 0
    assert json.loads(capsys.readouterr().out)[str(paths[0])][0][0] == found[0][0][0]


def test_what_is_asked_for_must_be_there(run, tmp_path, capsys):
    folder, _, _ = run
    weights = str(folder / "pruned.safetensors")
    (tmp_path / "no_image.png").write_bytes(b"text")
    export.save(tmp_path / "other.safetensors", stock())
    other = f"--weights={tmp_path / 'other.safetensors'}"
    for call, told in (
        (lambda: export.main([str(tmp_path), "out"]), "must be the workdir of a run that is done"),
        (lambda: evaluate.main([*FLAGS]), "--weights is missing"),
        (lambda: evaluate.main([f"--weights={weights}"]), "--config is missing"),
        (lambda: evaluate.main([other, *FLAGS]), "is of another network: it lacks"),
        (lambda: predict.main([other, "x.png"]), "does not say of which network it is"),
        (lambda: predict.main(["--weights", weights, str(tmp_path / "x.png")]), "cannot be read"),
        (
            lambda: predict.main(["--weights", weights, str(tmp_path / "no_image.png")]),
            "cannot be decoded",
        ),
    ):
        assert call() == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 10**9),
        ("num_classes", True),
        ("num_classes", 9),
        ("image_shape", [40000, 40000, 1]),
        ("image_shape", [8, 16, 1]),
        ("image_shape", []),
        ("image_shape", [8, 8, 3]),
        ("class_names", ["a"] * 9),
        ("class_names", "abcdefghij"),
        ("class_names", [["a"]] * 10),
        ("mean", ["0.3"]),
        ("mean", [0.3] * 3),
        ("std", [0]),
        ("seed", 10**30),
        ("config", None),
        ("config", []),
        ("a.b", 3),
    ],
)
def test_what_a_file_says_of_itself_is_checked(run, tmp_path, key, value, capsys):
    held = sparse_file.read(run[0] / "pruned.safetensors")
    facts = json.loads(json.dumps(held.facts))
    place = facts
    if key in ("mean", "std"):
        place = facts["config"]["data"]
    elif key in ("seed", "a.b"):
        place = facts["config"]
    place[key] = value
    path = tmp_path / "file.safetensors"
    sparse_file.write(path, held.arrays, sparse=held.sparse, facts=facts)
    assert predict.main([f"--weights={path}", "x.png"]) == 2
    error = capsys.readouterr().err
    assert "file.safetensors" in error or "config" in error
    assert "x.png" not in error


def test_names_of_classes_cannot_write_to_the_terminal(run, tmp_path, capsys):
    held = sparse_file.read(run[0] / "pruned.safetensors")
    path, image = tmp_path / "file.safetensors", tmp_path / "x.png"
    facts = {**held.facts, "class_names": ["\x1b[2J\n"] * 10}
    sparse_file.write(path, held.arrays, sparse=held.sparse, facts=facts)
    cv2.imwrite(str(image), np.zeros((8, 8), np.uint8))
    assert predict.main([f"--weights={path}", str(image)]) == 0
    out = capsys.readouterr().out
    assert (out.count("\n"), "\x1b" in out) == (1, False)
    assert predict.predict(path, []) == []


def test_files_of_a_run_that_say_nothing_are_refused(tmp_path):
    for text in ("{}", "[]", "null", "{"):
        for name in ("config.json", "result.json"):
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match="must be the workdir of a run that is done"):
            export.of_run(tmp_path)


def test_a_run_whose_scores_are_of_another_checkpoint_is_refused(run, tmp_path):
    folder, _, _ = run
    plain = json.loads((folder / "run" / "config.json").read_text())
    plain["checkpoint"]["select"] = "best_holdout"
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (tmp_path / "result.json").write_bytes((folder / "run" / "result.json").read_bytes())
    with pytest.raises(UsageError, match="not those of the last checkpoint"):
        export.of_run(tmp_path)
