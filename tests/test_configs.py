"""The files in `configs/`: every row of the paper's tables, recipes, and that all can be built."""

import itertools
import json
import pathlib

import jax
import pytest
from flax import nnx

from swat_jax import config_file, flops, listing, models, recipe
from swat_jax.errors import UsageError

ROWS = listing.rows()
PAPER = {
    *itertools.product(
        ["cifar10", "cifar100"],
        ["vgg16", "wrn16_8", "densenet121"],
        [f"{kind}{percent}" for kind in ("u", "erk", "m") for percent in (80, 90, 95)],
    ),
    *itertools.product(
        ["cifar10", "cifar100"],
        ["resnet18", "densenet121"],
        ["channel50", "channel60", "channel70"],
    ),
    *itertools.product(
        ["cifar10", "cifar100"], ["vgg16", "wrn16_8", "densenet121", "resnet18"], ["dense"]
    ),
    *itertools.product(
        ["imagenet"],
        ["imagenet_resnet50"],
        [*("u80", "u90", "erk80", "erk90", "m80", "m90"), "dense"],
    ),
    *itertools.product(["imagenet"], ["imagenet_wrn50_2"], ["u80", "u90", "dense"]),
    *itertools.product(
        ["imagenet"],
        ["imagenet_resnet50", "imagenet_wrn50_2"],
        ["channel50", "channel60", "channel70"],
    ),
}
FILES = sorted({row["config"] for row in ROWS})


def test_the_list_has_every_row_of_the_paper_once_and_digits():
    found = [(row["dataset"], row["network"], row["method"]) for row in ROWS]
    assert len(found) == len(set(found))
    assert {row for row in found if row[0] != "digits"} == PAPER
    assert {row[2] for row in found if row[0] == "digits"} >= {"dense", "u90", "erk90", "m90"}


def test_commands_of_the_list_name_their_config():
    for row in ROWS:
        prefix = f"python -m swat_jax.main --config {row['config']}:{row['method']} --workdir runs/"
        assert row["command"].startswith(prefix)
        assert ("data_dir" in row["command"]) == (row["dataset"] != "digits")
    workdirs = [row["command"].split("--workdir ")[1].split()[0] for row in ROWS]
    assert len(set(workdirs)) == len(ROWS)


# What the letters of a method's name stand for: distribution, granularity, first conv dense.
KINDS = {
    "dense": ("dense", "unstructured", True),
    "u": ("uniform", "unstructured", True),
    "erk": ("erk", "unstructured", False),
    "m": ("momentum", "unstructured", False),
    "channel": ("uniform", "channel", True),
    "filter": ("uniform", "filter", True),
}


@pytest.mark.parametrize("file", FILES)
def test_every_row_is_what_its_name_says(file):
    """In its config and in every layer; the network is the same for all of a file.

    That all rows can be built is in test_build.py.
    """
    methods = [row["method"] for row in ROWS if row["config"] == file]
    assert len(methods) >= 4
    table = {layer.path: layer for layer in flops.config_table(config_file.load(file))}
    layers = list(table.values())
    for method in methods:
        sparsity = config_file.load(f"{file}:{method}").sparsity
        kind = method.rstrip("0123456789")
        share = int(method.removeprefix(kind) or 0) / 100
        given = (sparsity.distribution, sparsity.granularity, sparsity.first_layer_dense)
        assert given == KINDS[kind], method
        assert (sparsity.weight, sparsity.activation) == (share, share), method
        found = flops.sparsities(layers, sparsity)
        first, *others = layers
        if kind == "erk":
            kept = sum((1 - found.weight[layer.path]) * layer.weights for layer in layers)
            total = sum(layer.weights for layer in layers)
            assert kept / total == pytest.approx(1 - share), method
            largest = max(layers, key=lambda layer: layer.weights)
            assert found.weight[first.path] < share < found.weight[largest.path], method
        else:
            expected = {layer.path: share for layer in others}
            expected[first.path] = 0.0 if sparsity.first_layer_dense else share
            assert found.weight == expected, method
            assert found.activation == expected, method


@pytest.mark.parametrize("file", FILES)
def test_docstring_says_how_to_run_it(file):
    text = config_file.load_module(pathlib.Path(file)).__doc__ or ""
    assert f"    python -m swat_jax.main --config {file}" in text
    assert "--workdir" in text
    assert "expect" in text.lower() or "has not run" in text


@pytest.mark.parametrize("file", FILES)
def test_default_method_and_json(file):
    config = config_file.load(file)
    assert config.sparsity.method == "u90"
    json.loads(config.to_json())


# file: epochs, milestones, factor, threshold period
CIFAR = {
    "vgg16": (150, (50, 100), 0.1, 20),
    "resnet18": (150, (50, 100), 0.1, 10),
    "wrn16_8": (200, (60, 120, 160), 0.2, 20),
    "densenet121": (150, (50, 100), 0.1, 10),
}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("network", CIFAR)
def test_cifar_recipe_of_the_paper(dataset, network):
    config = config_file.load(f"configs/{dataset}_{network}.py")
    schedule = config.optimizer.schedule
    assert (config.dataset, config.model.name, config.batch_size) == (dataset, network, 128)
    assert (
        config.epochs,
        schedule.milestones,
        schedule.factor,
        config.sparsity.threshold_every_steps,
    ) == CIFAR[network]
    assert (schedule.name, schedule.warmup_epochs) == ("step", 0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.momentum, optimizer.nesterov) == (0.1, 0.9, False)
    assert (optimizer.weight_decay, optimizer.decay_batch_norm) == (5e-4, True)
    assert config.label_smoothing == 0
    assert (config.data.source, config.data.name, config.data.on_device) == ("tfds", dataset, True)
    assert (config.data.augmentation, config.data.image_size) == ("crop_flip", 32)
    assert config.data.mean == (0.4914, 0.4822, 0.4465)
    assert config.data.std == (0.2023, 0.1994, 0.2010)
    assert config.sparsity.exact_epochs == 0


@pytest.mark.parametrize("network", ["resnet50", "wrn50_2"])
def test_imagenet_recipe_of_the_paper(network):
    config = config_file.load(f"configs/imagenet_{network}.py:u80")
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    assert (config.epochs, config.batch_size, config.label_smoothing) == (90, 256, 0.1)
    assert (optimizer.learning_rate, optimizer.momentum, optimizer.nesterov) == (0.1, 0.9, True)
    assert (optimizer.weight_decay, optimizer.decay_batch_norm) == (1e-4, False)
    assert (schedule.name, schedule.milestones, schedule.factor, schedule.warmup_epochs) == (
        "step",
        (30, 60, 80),
        0.1,
        5,
    )
    assert config.sparsity.threshold_every_steps == 1001  # five times in 5,005 steps
    assert (config.data.source, config.data.name) == ("tfds", "imagenet2012")
    assert (config.data.on_device, config.data.image_size) == (False, 224)
    assert config.data.augmentation == "random_resized_crop"


def test_digits_is_made_for_a_cpu():
    config = config_file.load("configs/digits.py")
    assert (config.model.name, config.precision, config.data.on_device) == (
        "resnet8",
        "float32",
        True,
    )
    model = nnx.eval_shape(
        lambda: models.create(config.model.name, num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    )
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) <= 300_000


def test_the_list_as_text():
    lines = listing.render(ROWS).splitlines()
    assert lines[0].split() == list(listing.COLUMNS)
    assert len(lines) == 1 + len(ROWS)
    for line, row in zip(lines[1:], ROWS, strict=True):
        assert line.split(maxsplit=3) == [row[column] for column in listing.COLUMNS]


def test_listing_refuses_an_empty_folder_and_a_file_without_methods(tmp_path):
    with pytest.raises(UsageError, match="no config files"):
        listing.rows(tmp_path)
    (tmp_path / "a.py").write_text("def get_config(method=''): ...")
    with pytest.raises(UsageError, match="lists no METHODS"):
        listing.rows(tmp_path)


def test_schema_is_the_same_everywhere():
    schema = recipe.base()
    for file in FILES:
        config = config_file.load(file)
        assert set(config.keys()) == set(schema.keys())
        for section in ("model", "data", "sparsity", "optimizer", "checkpoint", "eval", "log"):
            assert set(config[section]) == set(schema[section])
