"""The networks in pretrained/: they load and score on 32 test images; and how they are chosen."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import build, config_file, export, sparse_file
from swat_jax.data import on_device
from tests.data import archives
from tests.runs import ROOT

FOLDER = ROOT / "pretrained"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}
needs_files = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="pretrained/ is in the repository, not in the source distribution"
)
# How many of the first 32 test images of CIFAR-10 (tests/cifar10_images.npz) a file gets right.
RIGHT = {
    "cifar10_densenet121_u90": 31,
    "cifar10_resnet18_u90": 32,
    "cifar10_vgg16_m95": 32,
    "cifar10_wrn16_8_u90": 32,
}


@pytest.fixture
def script(load, monkeypatch, tmp_path):
    """`benchmarks/pretrained.py`, whose folder is empty."""
    script = load("pretrained")
    monkeypatch.setattr(script, "FOLDER", tmp_path / "pretrained")
    return script


def logits(path, images):
    """Of the file's network, of stock Flax layers in float32, for uint8 images."""
    facts = sparse_file.read(path).facts
    config = config_file.load(f"{ROOT}/configs/cifar10_{facts['network']}.py:{facts['method']}")
    config.precision = "float32"
    model = build.build_dense(config, num_classes=10, image_shape=(32, 32, 3), rngs=nnx.Rngs(0))
    export.load_into(path, model)
    model.eval()
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    return np.asarray(model(on_device.normalize(jnp.asarray(images), mean, std, jnp.float32)))


@needs_files
def test_every_file_has_its_number():
    assert FILES.keys() == RIGHT.keys()


@needs_files
@pytest.mark.parametrize("name", FILES)
def test_a_file_scores_on_a_handful_of_images(name):
    with np.load(ROOT / "tests/cifar10_images.npz") as held:
        found = logits(FILES[name], held["images"])
        assert np.all(np.isfinite(found))
        assert np.sum(np.argmax(found, axis=1) == held["labels"]) == RIGHT[name]


@needs_files
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_it_says(name):
    held = sparse_file.read(FILES[name])
    assert held.facts["class_names"] == list(archives.CIFAR10_NAMES)
    kernels = [array for name, array in held.arrays.items() if name.endswith("/kernel")]
    zeros = sum(np.count_nonzero(kernel == 0) for kernel in kernels)
    assert zeros / sum(kernel.size for kernel in kernels) == held.facts["weight_sparsity"]
    rounded = held.facts["scored"]["values"] == "bfloat16"
    for array in (held.arrays[name] for name in held.sparse):
        # The values of bfloat16 are those of float32 whose lower 16 bits are zero.
        assert np.all(array.view(np.uint32) & 0xFFFF == 0) == rounded


@needs_files
def test_all_files_fit(load):
    sizes = [path.stat().st_size for path in FILES.values()]
    assert sum(sizes) <= load("pretrained").MOST_MIB * 2**20


@needs_files
def test_the_table_is_up_to_date(load, capsys):
    assert load("pretrained").main(["--check"]) == 0, capsys.readouterr().out


def write(path, network, method="u90", accuracy=0.9, sparsity=0.9, scored=None):
    """A small file that says it is a network's; a third of its values cannot be bfloat16's."""
    kernel = np.array([0, 1 + 2**-10, 0, 0.5, 0, 2], np.float32)
    facts = {
        "dataset": "cifar10",
        "network": network,
        "method": method,
        "seed": 0,
        "steps": 9,
        "pruned_test_accuracy": accuracy,
        "weight_sparsity": 0.5,
        "config": {"sparsity": {"weight": sparsity}, "epochs": 3, "batch_size": 4, "seed": 0},
        **({"scored": scored} if scored else {}),
    }
    path.parent.mkdir(exist_ok=True)
    sparse_file.write(path, {"params/kernel": kernel}, sparse=["params/kernel"], facts=facts)
    return path


def test_the_best_of_each_network_is_chosen(script, tmp_path, capsys):
    candidates = [
        script.read(write(tmp_path / f"{number}.safetensors", *arguments))
        for number, arguments in enumerate(
            [
                ("vgg16", "u90", 0.91),
                ("vgg16", "erk95", 0.92, 0.95),
                ("vgg16", "channel70", 0.99, 0.7),
                ("resnet18", "u90", 0.93),
                ("wrn16_8", "u90", 0.94),
            ]
        )
    ]
    held = [
        script.read(write(tmp_path / "r.safetensors", "resnet18", "u90", 0.93)),
        script.read(write(tmp_path / "w.safetensors", "wrn16_8", "u90", 0.9)),
    ]
    chosen = script.choose(candidates, held)
    assert {one.path.stem for one in chosen} == {"1", "4"}
    assert capsys.readouterr().out == f"{tmp_path}/2.safetensors: not sparse enough\n"


@pytest.mark.parametrize(
    ("rounded", "values", "held"),
    [(0.92, "bfloat16", 1), (0.9198, "bfloat16", 1), (0.9196, "float32", 1 + 2**-10)],
)
def test_values_are_rounded_where_it_costs_nothing(
    script, tmp_path, monkeypatch, rounded, values, held
):
    source = write(tmp_path / "run.safetensors", "vgg16", "erk95")
    monkeypatch.setattr(script, "score", lambda path, *_: 0.92 if path == source else rounded)
    old = write(tmp_path / "pretrained/cifar10_vgg16_u90.safetensors", "vgg16")
    other = write(tmp_path / "pretrained/cifar10_resnet18_u90.safetensors", "resnet18")
    script.take(script.read(source), "data.npz")
    assert not old.exists()
    assert other.exists()
    found = sparse_file.read(tmp_path / "pretrained/cifar10_vgg16_erk95.safetensors")
    accuracy = rounded if values == "bfloat16" else 0.92
    assert found.facts["scored"] == {
        "accuracy": accuracy,
        "before_rounding": 0.92,
        "values": values,
    }
    assert found.arrays["params/kernel"][1] == held
    assert found.facts["class_names"] == list(archives.CIFAR10_NAMES)


def test_the_table(script, tmp_path, monkeypatch):
    scored = {"accuracy": 0.912, "before_rounding": 0.9121, "values": "bfloat16"}
    write(tmp_path / "pretrained/a.safetensors", "vgg16", "u90", 0.91, scored=scored)
    runs = tmp_path / "results"
    (runs / "cifar10").mkdir(parents=True)
    run = {
        "network": "vgg16",
        "method": "u90",
        "seed": 0,
        "steps": 9,
        "gpu_seconds": 12.4,
        "settings": ["x=1"],
        "device": "1 x GPU",
        "pruned_test_accuracy": 0.92,
    }
    monkeypatch.setattr(script.results, "RESULTS", runs)
    (runs / "cifar10/0.json").write_text(json.dumps(run))
    with pytest.raises(script.UsageError, match="docs/results has no run with its network, "):
        script.table(script.present())
    (runs / "cifar10/1.json").write_text(json.dumps(run | {"pruned_test_accuracy": 0.91}))
    line = script.table(script.present())[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("[`a`](a.safetensors)", "50.0%", "91.20", "91.21", "91.00", "bfloat16", "0.0"),
        "3 epochs of batch 4, seed 0, `x=1`",
        "[1 x GPU](../docs/results/cifar10/1.json), 12 s",
    ]


def test_weights_need_data(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["file.safetensors"])
    assert "need --data" in capsys.readouterr().err
