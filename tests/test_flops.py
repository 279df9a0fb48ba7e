"""FLOPs: by hand for a small network, and the columns of the paper."""

import json
import re
import subprocess
import sys
from typing import Any

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from swat_jax import flops, layers, method
from tests.models.networks import table

# Training FLOP reduction in percent as the paper prints it, with the tolerance that is reached.
TRAINING = [
    ("imagenet_resnet50", "u80", 76.1, 0.05),
    ("imagenet_resnet50", "u90", 85.6, 0.05),
    ("imagenet_resnet50", "channel50", 47.6, 0.05),
    ("imagenet_resnet50", "channel60", 57.1, 0.05),
    ("imagenet_resnet50", "channel70", 66.6, 0.05),
    ("imagenet_wrn50_2", "u80", 78.6, 0.05),
    ("imagenet_wrn50_2", "u90", 88.4, 0.05),
    ("imagenet_wrn50_2", "channel50", 49.1, 0.05),
    ("imagenet_wrn50_2", "channel60", 58.9, 0.05),
    ("imagenet_wrn50_2", "channel70", 68.7, 0.05),
    ("wrn16_8", "u90", 90.0, 0.05),
    ("densenet121", "u90", 89.8, 0.05),
    ("densenet121", "channel50", 49.9, 0.05),
    ("densenet121", "channel60", 59.9, 0.05),
    ("densenet121", "channel70", 69.9, 0.05),
    ("resnet18", "channel50", 49.9, 0.05),
    ("resnet18", "channel60", 59.8, 0.05),
    ("resnet18", "channel70", 69.8, 0.05),
    ("vgg16", "erk95", 89.5, 0.06),
    ("wrn16_8", "erk95", 91.4, 0.3),
    ("densenet121", "erk90", 89.7, 0.3),
    ("imagenet_resnet50", "erk80", 60.0, 0.3),
]
# Rows that do not come out: what the convention gives, what the paper prints.
DEVIATIONS = [
    ("vgg16", "u90", 89.5, 89.7),
    ("imagenet_resnet50", "erk90", 77.2, 79.0),
]
INFERENCE = [
    ("imagenet_resnet50", "u80", 77.7),
    ("imagenet_resnet50", "u90", 87.4),
    ("imagenet_resnet50", "channel50", 48.6),
    ("imagenet_resnet50", "channel60", 58.3),
    ("imagenet_resnet50", "channel70", 68.0),
]


def sparsity_of(text):
    return method.apply(ConfigDict({"sparsity": {}}), text).sparsity


def training(name, text):
    found = flops.sparsities(table(name), sparsity_of(text))
    return flops.training_flop_reduction(table(name), found.weight, found.activation)


@pytest.mark.parametrize(("name", "text", "paper", "tolerance"), TRAINING)
def test_training_column_of_the_paper(name, text, paper, tolerance):
    assert abs(training(name, text) - paper) <= tolerance


@pytest.mark.parametrize(("name", "text", "ours", "paper"), DEVIATIONS)
def test_rows_that_the_convention_does_not_reproduce(name, text, ours, paper):
    assert round(training(name, text), 1) == ours != paper


@pytest.mark.parametrize(("name", "text", "paper"), INFERENCE)
def test_inference_column_of_the_paper(name, text, paper):
    found = flops.sparsities(table(name), sparsity_of(text))
    assert round(flops.inference_flop_reduction(table(name), found.weight), 1) == paper


class Small(nnx.Module):
    """Not in the order of creation; groups, strides, a layer used twice, an axis more."""

    def __init__(self, conv: Any = nnx.Conv, linear: Any = nnx.Linear):
        rngs = nnx.Rngs(0)
        self.last: Any = linear(6, 5, rngs=rngs)
        self.body: Any = conv(4, 6, (3, 3), (2, 2), feature_group_count=2, rngs=rngs)
        self.stem: Any = conv(3, 4, (5, 5), rngs=rngs)
        self.shared: Any = conv(6, 6, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.body(self.stem(x)))
        x = self.shared(self.shared(x))
        return self.last(x.reshape(len(x), 6, 6))


EXPECTED = [
    flops.Layer("stem", "conv", (5, 5, 3, 4), (4, 6), (4, 6)),
    flops.Layer("body", "conv", (3, 3, 2, 6), (4, 6), (2, 3), groups=2),
    flops.Layer("shared", "conv", (1, 1, 6, 6), (2, 3), (2, 3)),
    flops.Layer("shared", "conv", (1, 1, 6, 6), (2, 3), (2, 3)),
    flops.Layer("last", "linear", (6, 5), (6,), (6,)),
]


def test_layer_table_is_in_execution_order():
    assert flops.layer_table(Small(), (4, 6, 3)) == EXPECTED


def test_layer_table_takes_abstract_and_sparse_models_and_leaves_them_alone():
    sparse = Small(layers.SwatConv, layers.SwatLinear)
    sparse.stem.set_sparsity(weight_sparsity=0.5, activation_sparsity=0.5, threshold_every_steps=2)
    before = jax.tree.map(lambda x: x, nnx.state(sparse))
    assert flops.layer_table(sparse, (4, 6, 3)) == EXPECTED
    assert flops.layer_table(nnx.eval_shape(Small), (4, 6, 3)) == EXPECTED
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, nnx.state(sparse)))
    assert "conv_general_dilated" not in vars(sparse.stem)


def test_macs_by_hand():
    stem, body, shared, _, last = EXPECTED
    assert (stem.weights, stem.activations) == (300, 72)
    assert (stem.macs_forward, stem.macs_input_gradient) == (300 * 24, 300 * 24)
    assert (body.weights, body.activations) == (108, 4 * 24)
    assert (body.macs_forward, body.macs_input_gradient) == (108 * 6, 108 * 24)
    assert (shared.macs_forward, shared.macs_input_gradient) == (36 * 6, 36 * 6)
    assert (last.weights, last.activations) == (30, 36)
    assert (last.macs_forward, last.macs_input_gradient) == (180, 180)


def test_reductions_by_hand():
    weight = {"stem": 0.0, "body": 0.5, "shared": 0.75, "last": 1.0}
    activation = {"stem": 0.0, "body": 0.25, "shared": 0.5, "last": 0.0}
    forward = [7200, 648, 216, 216, 180]
    backward = [7200, 2592, 216, 216, 180]  # of the input
    saved = (648 + 2592) * 0.5 + 648 * 0.25 + 2 * (432 * 0.75 + 216 * 0.5) + 360
    dense = 2 * sum(forward) + sum(backward)
    assert flops.training_flop_reduction(EXPECTED, weight, activation) == pytest.approx(
        100 * saved / dense
    )
    assert flops.inference_flop_reduction(EXPECTED, weight) == pytest.approx(
        100 * (648 * 0.5 + 2 * 216 * 0.75 + 180) / sum(forward)
    )
    # weights of `shared` count once, its two uses keep an input each
    assert flops.mean_weight_sparsity(EXPECTED, weight) == pytest.approx(
        100 * (108 * 0.5 + 36 * 0.75 + 30) / (300 + 108 + 36 + 30)
    )
    assert flops.mean_activation_sparsity(EXPECTED, activation) == pytest.approx(
        100 * (96 * 0.25 + 2 * 36 * 0.5) / (72 + 96 + 2 * 36 + 36)
    )
    pairs = 100 * (12 * 0.5 + 36 * 0.75) / (12 + 12 + 36)
    assert flops.channels_pruned(EXPECTED, weight, "channel") == pytest.approx(pairs)
    for granularity in ("unstructured", "vector16"):
        assert flops.channels_pruned(EXPECTED, weight, granularity) == 0


def test_sparsities_by_distribution():
    paths = [layer.path for layer in EXPECTED]
    assert set(flops.sparsities(EXPECTED, sparsity_of("dense")).weight.values()) == {0.0}
    uniform = flops.sparsities(EXPECTED, sparsity_of("u90"))
    assert uniform.weight == uniform.activation == {**dict.fromkeys(paths, 0.9), "stem": 0.0}
    assert flops.sparsities(EXPECTED, sparsity_of("m90")).weight == dict.fromkeys(paths, 0.9)
    both = sparsity_of("u90")
    both.activation = 0.5
    found = flops.sparsities(EXPECTED, both)
    assert (found.weight["body"], found.activation["body"]) == (0.9, 0.5)


def test_erk_keeps_the_total_and_orders_layers_by_shape():
    layers_ = table("vgg16")
    weight = flops.sparsities(layers_, sparsity_of("erk95")).weight
    assert flops.mean_weight_sparsity(layers_, weight) == pytest.approx(95)
    # one constant times sum(shape) / prod(shape), linear layers with their 2-D shape
    constants = {
        layer.path: (1 - weight[layer.path]) * layer.weights / sum(layer.kernel_shape)
        for layer in layers_
        if weight[layer.path] > 0
    }
    assert {"hidden1", "hidden2", "stage3/0/conv"} <= set(constants)
    assert max(constants.values()) == pytest.approx(min(constants.values()))
    assert weight["stem"] == 0


def run(capsys, *arguments):
    code = flops.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line_names_what_flags_made_of_the_method(capsys):
    flags = ["--config.sparsity.weight=0.8", "--config.sparsity.activation=0.8"]
    _, out, _ = run(capsys, "--config", "configs/digits.py:u90", *flags)
    assert "resnet8, u80: " in out


def test_command_line_json(capsys):
    code, out, err = run(capsys, "--config", "configs/digits.py:channel70", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert (result["network"], result["method"], result["note"]) == ("resnet8", "channel70", "")
    assert [layer["path"] for layer in result["layers"]][:2] == ["stem", "stage1/0/conv1"]
    assert result["layers"][0]["weight_sparsity"] == 0
    assert result["layers"][-1]["activation_sparsity"] == 0.7
    assert sum(x["macs_forward"] for x in result["layers"]) == result["forward_macs"]
    for key in ("training_flop_reduction", "inference_flop_reduction", "channels_pruned"):
        assert 69 < result[key] < 70


def test_command_line_text_and_overrides(capsys):
    code, out, _ = run(capsys, "--config=configs/digits.py:m90", "--config.sparsity.weight=0.5")
    assert code == 0
    assert "stage2/0/shortcut" in out
    assert "weight sparsity             50.0 %" in out
    assert "activation sparsity         90.0 %" in out
    assert "note: the budgets of momentum change" in out


def test_command_line_bytes(capsys):
    """What the figures are is for `tests/test_memory.py`; here: of what, and how it is printed."""
    arguments = ("--config", "configs/cifar10_resnet18.py:u90", "--bytes")
    code, out, err = run(capsys, *arguments, "--config.devices=2")
    assert (code, err) == (0, "")
    assert out.startswith(
        "kept for the backward pass of resnet18, dense, and of u90 as it is with the kernels,"
        " in bytes: 64 images on one device, bfloat16\n\nlayer "
    )
    # 64 * 32 * 32 * 64 values of two bytes, twice 64 of four; and one bit for each.
    norm = 64 * 32 * 32 * 64 * 2 + 2 * 64 * 4
    line = rf"stage1/0/norm2 +input +{norm:,} +0  input, signs +{norm + 64 * 32 * 32 * 8:,} +0\n"
    assert re.search(line, out)
    assert re.search(r"stage2/0/shortcut +input, shared +0 +16,384  packed input, shared +4", out)
    assert re.search(r"\nu90   +[0-9.]+ MiB: .* of weights; 0\.[0-9]{2} of dense\n$", out)

    code, out, _ = run(capsys, *arguments, "--batch_size=5", "--json")
    result = json.loads(out)
    assert (code, result["batch_size"], result["precision"]) == (0, 5, "bfloat16")
    for name in ("dense", "swat"):
        for key in ("activations", "weights"):
            parts = sum(layer[name][key] for layer in result["layers"])
            assert parts == result[name][key] > 0
        assert result[name]["bytes"] == result[name]["activations"] + result[name]["weights"]
    assert result["layers"][0] == {
        "path": "stem",
        "kind": "conv",
        "dense": {"what": "input", "activations": 5 * 32 * 32 * 3 * 2, "weights": 0},
        "swat": {
            "what": "input",
            "activations": 5 * 32 * 32 * 3 * 2,
            "weights": 3 * 3 * 3 * 64 * 2,
        },
    }


def test_bytes_line_up_under_a_long_name(capsys):
    flags = ["--bytes", "--config.sparsity.weight=0.8"]
    _, out, _ = run(capsys, "--config", "configs/digits.py:u90", *flags)
    _, _, *lines = out.split("\n\n")[1].splitlines()
    assert "u (weight 80, activation 90)" in out
    assert len({len(line) for line in lines}) == 1


def test_command_line_bytes_of_the_dense_method(capsys):
    code, out, _ = run(capsys, "--config", "configs/digits.py:dense", "--bytes")
    first, _, head, *_, last = out.splitlines()
    assert code == 0
    assert first.endswith("resnet8, dense, in bytes: 64 images on one device, float32")
    assert head.split() == ["layer", "dense", "activations", "weights"]
    assert last.startswith("dense ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=configs/digits.py:x90"], "'x90'"),
        (["--config=configs/digits.py", "--config.model.name=lenet"], "no network 'lenet'"),
        (["--config=configs/digits.py", "--config.sparsity.weight=1.0"], "weight|sparsity"),
        (["--config=configs/cifar10_vgg16.py", "--config.data.image_size=16"], "at least 32x32"),
        (["--jsn"], "jsn"),
        (["--config=configs/digits.py", "--batch_size=4"], "--batch_size: only --bytes"),
        (
            ["--config=configs/digits.py", "--bytes", "--batch_size=0"],
            "--batch_size must be a whole",
        ),
        (
            ["--config=configs/digits.py", "--bytes", "--config.devices=3"],
            r"config\.batch_size must be divisible by config\.devices, got 64 and 3",
        ),
        (
            ["--config=configs/digits.py", "--bytes", "--config.batch_size=0"],
            r"config\.batch_size must be a whole number >= 1, got 0",
        ),
        (
            ["--config=configs/digits.py", "--bytes", "--config.sparsity.pack=False"],
            r"config\.sparsity\.pack must not be False",
        ),
        (["--config=configs/digits.py", "--bytes", "--config.precision=int8"], "'int8'"),
        (
            [
                "--config=configs/cifar10_vgg16.py",
                "--bytes",
                "--batch_size=1",
                "--config.data.image_size=16",
            ],
            "at least 32x32",
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_as_a_program():
    command = [sys.executable, "-m", "swat_jax.flops", "--config", "nowhere.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        result.stderr == "error: config: no file 'nowhere.py'; --list prints the ones there are\n"
    )
