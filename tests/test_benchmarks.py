"""What the benchmarks measure is what they say: the parts of them that need no GPU."""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import config_file, data_parallel, timing, training_setup
from swat_jax.data import Info
from swat_jax.models import vgg
from swat_jax.models.densenet import DenseNet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.layer_types import LayerTypes
from swat_jax.models.resnet import BasicBlock, ResNet
from swat_jax.sparsity import top_k

pytestmark = pytest.mark.newest


def build(name):
    facts = {
        "num_classes": 3,
        "in_channels": 3,
        "make": LayerFactory(LayerTypes(), rngs=nnx.Rngs(0)),
    }
    if name == "resnet":
        return ResNet(BasicBlock, (1, 1), widths=(4, 8), **facts)
    if name == "densenet":
        return DenseNet((1, 1), 4, **facts)
    return vgg.VGG((1, 2, 1, 1, 1), dropout_rate=0.5, **facts)


def gradients(name):
    """Loss, new averages and gradients, and the number of blocks that are computed again."""
    model = build(name)
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    def loss(params):
        copy = nnx.merge(graph, params, rest, copy=True)
        value = jnp.sum(jnp.square(copy(images)))
        return value, nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

    both = jax.value_and_grad(loss, has_aux=True)
    (value, averages), grads = jax.jit(both)(params)
    blocks = str(jax.make_jaxpr(both)(params)).count("remat")
    return value, averages, nnx.to_pure_dict(grads), blocks


@pytest.mark.parametrize(("name", "blocks"), [("resnet", 2), ("densenet", 3), ("vgg", 4)])
def test_blocks_that_are_computed_again_change_no_value(load, monkeypatch, name, blocks):
    monkeypatch.setattr(vgg, "HIDDEN", 8)
    *expected, none = gradients(name)
    with load("training_step").checkpointed_blocks():
        *found, number = gradients(name)
    assert (none, number) == (0, blocks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found,
                 expected)  # fmt: skip
    assert gradients(name)[-1] == 0  # nothing is left behind


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("keep", [1, 7, 100, 480])
def test_a_sort_finds_the_exact_threshold(load, dtype, keep):
    x = jax.random.normal(jax.random.key(keep), (16, 30)).astype(dtype)
    x = x if keep % 2 else jnp.maximum(x, 0)
    found = load("training_step").sorted_threshold(x, jnp.uint32(keep))
    expected = top_k.threshold(x, keep)
    assert found.dtype == expected.dtype
    assert found == expected


def test_steps_of_one_dispatch_begin_with_a_refresh_and_count_one_batch(load):
    calls = []

    def compiled(state, images, labels, order):
        calls.append(int(state["step"]))
        return {"step": state["step"] + 20}, {}

    images, labels = jnp.zeros((50, 8, 8, 3), jnp.uint8), jnp.zeros(50, jnp.int32)
    measured = load("training_step").ResidentSteps(
        config=types.SimpleNamespace(batch_size=5), info=None, compiled=compiled,
        state={"step": jnp.int32(7)}, batches=((images, labels),), period=10, steps=20,
        order=jnp.arange(50),
    )  # fmt: skip
    assert measured.milliseconds(30) > 0
    assert (calls, measured.done) == ([0, 0], 40)
    assert measured._others == 45 * 8 * 8 * 3


def test_naive_and_blocks_are_set_apart_only_inside(load):
    steps, methods = load("training_step"), load("methods").METHODS
    before, block = top_k.threshold, BasicBlock.__call__
    with steps.apart(methods["naive u90"]):
        assert top_k.threshold is steps.sorted_threshold
        assert os.environ["SWAT_JAX_BACKEND"] == "xla"
    with steps.apart(methods["dense, checkpoint"]):
        assert BasicBlock.__call__ is not block
    assert top_k.threshold is before
    assert BasicBlock.__call__ is block


@pytest.mark.parametrize("method", ["u90, own model", "dense, own model"])
def test_a_users_own_model_is_trained_by_the_same_steps(load, monkeypatch, method):
    steps, one = load("training_step"), load("methods").OWN_MODEL[method]
    monkeypatch.setattr(steps.stock_model, "SIZES", (1, 1))
    monkeypatch.setattr(steps.stock_model, "WIDTH", 4)
    before = training_setup.build.build
    settings = {"sparsity.pack": True}
    with steps.apart(one):
        found = steps.make("imagenet_resnet50", one.name, 1, settings=settings, only_compile=True)
    assert found.temporary_bytes > 0
    assert training_setup.build.build is before
    table = load("own_model").compared(
        [
            {"method": one.name, "ms": 10.0, "peak_mib": 100.0},
            {"method": method, "ms": 10.4, "peak_mib": 107.0},
        ]
    )
    assert table == [
        f"{method}: 1.040 of the time and 1.070 of the memory of {one.name}, NOT within 1.05"
    ]


PROGRAM = """\
HloModule jit_body, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[]}

%fused_computation (param_0: bf16[64,8]) -> bf16[64,8] {
  %param_0 = bf16[64,8]{1,0} parameter(0)
  ROOT %convolution.1 = bf16[64,8]{1,0} convolution(%param_0, %param_0), dim_labels=bf_io->bf
}

ENTRY %main.9 (x.1: bf16[64,8], stored: f32[], refresh: pred[]) -> (bf16[64,8], f32[]) {
  %x.1 = bf16[64,8]{1,0} parameter(0), metadata={op_name="jit(body)/(x)"}
  %stored = f32[] parameter(1)
  %refresh = pred[] parameter(2)
  %keep = u32[2]{0} constant({0, 51})
  %flag = pred[] constant(true)
  %conv.1 = bf16[64,8]{1,0} fusion(bf16[64,8]{1,0} %x.1), kind=kCustom, calls=%fused_computation
  %conv.2 = (bf16[64,8]{1,0}, u8[900]{0}) custom-call(%x.1), custom_call_target="__cudnn$convForward"
  %relu.1 = (bf16[64,8]{1,0}, u32[0]{0}, u32[16]{0}, /*index=3*/u32[]) custom-call(%conv.1, %flag), \
custom_call_target="swat_jax_batch_norm_relu", backend_config={mode = 2 : i64}
  %made = bf16[64,8]{1,0} get-tuple-element(%relu.1), index=0
  %bits = u32[16]{0} get-tuple-element(%relu.1), index=2
  %limit = (f32[], u32[500]{0}) custom-call(%x.1, %keep, %refresh, %stored), \
custom_call_target="swat_jax_threshold", api_version=API_VERSION_TYPED_FFI
  %limit.1 = f32[] get-tuple-element(%limit), index=0
  %unpack.1 = bf16[512]{0} custom-call(%bits, %limit.1), custom_call_target="swat_jax_unpack"
  %copy.1 = bf16[64,8]{1,0} copy(%made)
  ROOT %tuple = (bf16[64,8]{1,0}, f32[]) tuple(%copy.1, %limit.1)
}
"""  # noqa: E501


def test_kinds_and_bytes_of_a_compiled_program(load):
    program = load("hlo").Program(PROGRAM)
    assert program.name == "jit_body"
    kinds = {name: program.kind(name) for name in ("conv.1", "conv.2", "relu.1", "copy.1", "none")}
    assert kinds == {
        "conv.1": "convolutions", "conv.2": "convolutions", "relu.1": "batch_norm_relu",
        "copy.1": "copies", "none": "not in the program",
    }  # fmt: skip
    assert program.is_ours("relu.1")
    assert not program.is_ours("conv.2")
    # Input and flag, result and bitmap; the last result is scratch.
    assert program.moved_bytes("relu.1", refresh=False) == 1024 + 1 + 1024 + 64
    assert program.moved_bytes("unpack.1", refresh=False) == 64 + 4  # nobody reads its result
    assert program.moved_bytes("limit", refresh=True) == 1024 + 8 + 1 + 4 + 4
    assert program.moved_bytes("limit", refresh=False) == 4  # it is reused


def test_the_program_that_jax_prints_can_be_read(load):
    compiled = jax.jit(lambda x: jnp.sort(x @ x)).lower(jnp.ones((8, 8))).compile()
    program = load("hlo").Program(compiled.as_text())
    kinds = set(map(program.kind, program.instructions))
    assert {"sorts"} < kinds
    sizes = {sum(one.results) for one in program.instructions.values()}
    assert 256 in sizes


def test_rows_are_the_best_round_beside_dense_in_the_group(load):
    steps = load("steps")

    def times(*pairs):
        return [{"reused_ms": a, "refreshed_ms": b, "peak_mib": 8.0} for a, b in pairs]

    facts = {"threshold_every_steps": 4, "device": "d", "versions": {}, "library": {}}
    dense = types.SimpleNamespace(network="n:2", method="dense", error="", facts=facts)
    other = types.SimpleNamespace(network="n:2", method="u90", error="", facts=facts)
    base = steps.summary(dense, times((4.0, 4.0), (2.0, 2.0)))
    found = steps.row(other, times((3.0, 7.0), (5.0, 5.0)), base)
    assert found["ms"] == 4.0  # (3 * 3 + 7) / 4
    assert found["rounds_ms"] == [4.0, 5.0]
    assert found["time_ratio"] == 2.0
    assert found["memory_ratio"] == 1.0
    assert found["images_per_second"] == 500
    report = steps.report([found, {"network": "n", "batch": 2, "method": "x", "error": "why"}])
    assert report["device"] == "d"
    assert "device" not in report["steps"][0]
    assert [row["error"] for row in report["failed"]] == ["why"]


def test_reports_are_joined_by_the_latest_row_in_the_order_of_methods(load, tmp_path):
    steps = load("steps")
    row = {"network": "n", "batch": 2, "method": "u90"}
    files = []
    for number, method in enumerate(("u90", "u80", "u90")):
        steps_ = [{**row, "method": method, "ms": number}]
        found = {"device": "d", "versions": {}, "steps": steps_, "failed": []}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(found))
    joined = steps.merge(files)["steps"]
    assert [(one["method"], one["ms"]) for one in joined] == [("u80", 1), ("u90", 2)]
    files[1].write_text(json.dumps({"device": "e", "versions": {}, "steps": [], "failed": []}))
    with pytest.raises(SystemExit, match="device is e"):
        steps.merge(files)


def test_a_process_that_fails_holds_up_nobody(load, capsys):
    options = argparse.Namespace(
        methods=["dense", "u90"], jobs=2, rounds=1, steps=5, timeout=120, cache=None
    )
    rows = list(load("steps").measure_network("no_such_config:2", options))
    assert [row["method"] for row in rows] == ["dense", "u90"]
    assert all("no_such_config" in row["error"] for row in rows)
    assert "no_such_config:2 u90" in capsys.readouterr().err


def test_backends_differ_by_no_more_than_seeds(load):
    equivalence = load("equivalence")
    second = [[3.0, 1.0, 2.0, 2.0, 9.0], [3.0, 2.0, 2.0, 1.0, 9.0]]  # what is left over: 9
    near = [[3.0, 1.0, 2.0, 2.25, 9.0], [3.0, 2.5, 2.0, 1.0, 9.0]]
    verdict = equivalence.compare(near, second, 2)
    assert (verdict["difference"], verdict["bound"]) == (0.25, 0.5)
    assert verdict["holds"]
    assert verdict["windows"] == 2
    assert verdict["steps_alike"] == 1
    far = [[3.0, 1.0, 2.0, 2.0, 9.0], [3.0, 3.5, 2.0, 1.0, 9.0]]
    assert not equivalence.compare(far, second, 2)["holds"]
    broken = [[3.0, 1.0, math.nan, 2.0, 9.0], [3.0, 2.0, 2.0, 1.0, 9.0]]
    assert not equivalence.compare(broken, second, 2)["holds"]
    picture = equivalence.svg({
        "network": "resnet8", "method": "u90", "batch": 2, "steps": 5, "device": "cpu",
        "losses": {"cuda": near, "xla": second}, "verdict": verdict,
    })  # fmt: skip
    assert picture.count("<polyline") == picture.count("<polygon") == 2


CHILD = """
import json, sys
print(json.dumps({"device": "some", "versions": {}, "steps_per_dispatch": 30}), flush=True)
for line in sys.stdin:
    print("noise")
    ends = [100 + n * float(line) / 4 for n in range(5)]
    print(json.dumps({"ends": ends}), flush=True)
"""


def test_every_way_of_graphs_has_its_flags_and_the_environment_stays(load, monkeypatch):
    load("steps")
    script = load("cuda_graphs")
    monkeypatch.setenv("XLA_FLAGS", "--given")
    flags = []

    class Member(script.steps.Member):
        def __init__(self, network, method, options, folder):
            flags.append((method, os.environ["XLA_FLAGS"]))
            self.network, self.method, self.error = network, method, ""
            self.facts, self.times = {"method": method, "threshold_every_steps": 4}, []

        def compiled(self):
            return True

        def time(self):
            found = {"reused_ms": 2.0, "refreshed_ms": 6.0, "peak_mib": 1}
            self.times.append(found)

        def close(self):
            pass

    monkeypatch.setattr(script.steps, "Member", Member)
    options = argparse.Namespace(methods=["dense", "u90"], graphs=["none", "default"], rounds=2)
    rows = script.measure("cifar10_vgg16:16", options)
    off = "--given --xla_gpu_enable_command_buffer="
    assert flags == [(method, f) for method in ("dense", "u90") for f in (off, "--given")]
    assert os.environ["XLA_FLAGS"] == "--given"
    assert [(row["method"], row["graphs"]) for row in rows] == [
        ("dense", "none"), ("dense", "default"), ("u90", "none"), ("u90", "default"),
    ]  # fmt: skip
    assert {row["ms"] for row in rows} == {3.0}


def test_images_of_several_runs_are_added_up(load, monkeypatch, tmp_path, capsys):
    script, started = load("several_runs"), []

    def start(options, count):
        started.append(count)
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr(script, "start", start)
    output = tmp_path / "found.json"
    command = ["several_runs", "--network=cifar10_vgg16:16", "--at_once", "1", "3", "--seconds=2"]
    monkeypatch.setattr(sys, "argv", [*command, f"--output={output}"])
    script.main()
    assert started == [1, 1, 1, 3]  # three processes, and one of three seeds
    found = json.loads(output.read_text())
    one = 4 * 30 * 16 / 2
    assert [(row["way"], row["at_once"], row["images_per_second"]) for row in found["rows"]] == [
        ("processes", 1, one), ("processes", 3, 3 * one), ("vmap", 3, 3 * one)
    ]  # fmt: skip
    assert "some" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([[0, 1, 2, 3]], 1.0),
        ([[0, 1, 2, 3], [0, 0.5, 1, 1.5, 2, 2.5, 3]], 3.0),
        # From 1 to 3: two of the first, and half of the second's slow one, and one more.
        ([[0, 1, 2, 3, 4], [1, 2, 3]], 2.0),
        ([[0, 2, 4], [1, 3]], 1.0),
    ],
)
def test_dispatches_count_while_all_work(load, found, expected):
    assert load("several_runs").dispatches_per_second(found) == pytest.approx(expected)


def test_dispatches_of_different_times_are_no_measurement(load):
    with pytest.raises(SystemExit, match="did not work at the same time"):
        load("several_runs").dispatches_per_second([[0, 1], [2, 3]])


def test_seeds_that_train_together_train_as_each_alone(load):
    config = config_file.load("configs/digits.py:u90")
    config.batch_size = 8
    info = Info(
        name="", num_classes=10, image_shape=(8, 8, 1), num_train=32, num_holdout=0, num_test=1,
        mean=(0.3,), std=(0.4,), class_names=tuple("0123456789"),
    )  # fmt: skip
    mesh = data_parallel.make_mesh(1)
    trainer, make_state = training_setup.make_trainer(config, info, mesh)
    states = [make_state()]
    config.seed = 1
    states.append(training_setup.make_trainer(config, info, mesh)[1]())
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (32, 8, 8, 1)), jnp.uint8)
    labels, order = jnp.asarray(rng.integers(0, 10, 32), jnp.int32), jnp.arange(32)
    state, train = load("several_runs").together(trainer, states, 2)
    found, metrics = jax.jit(train)(state, images, labels, order)
    assert int(found["step"]) == 2
    for seed, one in enumerate(states):
        alone, told = trainer.train_steps(one, images, labels, order, 2)
        np.testing.assert_allclose(metrics["loss"][seed], told["loss"], rtol=1e-4)
        for a, b in zip(
            jax.tree.leaves(found["params"]), jax.tree.leaves(alone["params"]), strict=True
        ):
            np.testing.assert_allclose(a[seed], b, rtol=1e-3, atol=1e-4)


def test_the_page_on_performance_is_that_of_the_results(load):
    script = load("performance")
    page = (script.ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert script.page() == page, "run python benchmarks/performance.py"


@pytest.mark.parametrize("name", ["tables", "sparse_conv_page"])
def test_tables_in_pages_are_those_of_the_results(name):
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    told = subprocess.run([sys.executable, script, "--check"], capture_output=True, check=False)
    assert told.returncode == 0, told.stdout.decode() + told.stderr.decode()


def test_the_convs_of_sparse_conv_and_one_line_of_its_table(load, monkeypatch):
    convs, activations = load("convs"), load("sparse_activations")
    found = convs.problems(["imagenet_resnet50"], every=False)
    marks = [one.name for one in found if one.is_mark]
    expected = {"1x1 64->256 @56", "1x1 256->64 @56", "1x1 128->512 @28", "1x1 512->128 @28"}
    assert set(marks) == expected
    assert [one.name for one in found[:4]] == marks
    # Sixteen blocks of two, the first of a stage with one more.
    assert sum(one.layers for one in found) == 2 * 16 + 4
    (problem,) = [one for one in found if one.name == "1x1/2 256->512 @56"]
    assert problem.operations == 2 * 256 * 256 * 512 * 28**2
    everything = convs.problems(list(convs.NETWORKS), every=True)
    stems = {one for one in everything if activations.refusal(one)}
    assert {one.window for one in everything} - {(7, 7)} == {(1, 1), (3, 3)}
    assert {one.network for one in stems} == set(convs.NETWORKS)
    assert {one.channels[0] for one in stems} == {3}

    monkeypatch.setattr(timing, "COUNT", 1)
    monkeypatch.setattr(timing, "REPEATS", 1)
    small = convs.Problem("wrn16_8", 2, (3, 3), (64, 72), (8, 8), (4, 4), 2)
    row, sparser = activations.measure(small, [0.75, 0.9], True, (1e6, 1e6), lambda: 0.0)
    assert (row["sparsity"], sparser["sparsity"]) == (0.75, 0.9)
    assert sparser["error"] < 2**-7
    assert row["bytes"] - sparser["bytes"] == 2 * (2048 - 820)
    assert row["operations"] == 2 * 2 * 9 * 64 * 72 * 16
    assert row["bytes"] == 2 * 2048 + 8192 / 8 + 4 * 4 + 2 * 2304 + 4 * 9 * 64 * 72
    assert row["error"] < 2**-7
    assert set(row["cuts_ms"]) == {"128x128/1", "64x64/1"}
    first, second = activations.lines(row)
    assert "3x3/2 64->72 @8" in first
    assert "128x128" in second


def test_the_convs_with_sparse_weights_and_lines_of_their_table(load, monkeypatch):
    convs, weights = load("convs"), load("sparse_weights")
    networks = ["imagenet_resnet50", "wrn16_8"]
    marks = [one for one in convs.problems(networks, every=True) if weights.is_mark(one)]
    expected = {"3x3 128->128 @28", "3x3 256->256 @14", "3x3 512->512 @7"}
    expected |= {"3x3 128->128 @32", "3x3 256->256 @16", "3x3 512->512 @8"}
    assert {one.name for one in marks} == expected
    assert not any(weights.refusal(one, op, jnp.float32) for one in marks for op in weights.OPS)

    monkeypatch.setattr(timing, "COUNT", 1)
    monkeypatch.setattr(timing, "REPEATS", 1)
    small = convs.Problem("wrn16_8", 2, (3, 3), (16, 8), (8, 8), (8, 8), 1)
    for op, dtype in (("forward", jnp.float32), ("input_gradient", jnp.bfloat16)):
        row, sparser = weights.measure(small, op, dtype, [0.75, 0.9], True, 1e6, lambda: 0.0)
        assert sparser["products"] < row["products"]
        assert max(row["error"], sparser["error"]) < (1e-5 if dtype == jnp.float32 else 2**-7)
        size = jnp.dtype(dtype).itemsize
        assert row["products"] == 9 * 16 * 8 * 128 / 4
        assert row["bytes"] == size * (128 * 16 + 128 * 8 + 9 * 16 * 8)
        assert (row["tf32_ms"] is None) == (size == 2)
        first, second = weights.lines(row)
        assert "3x3 16->8 @8" in first
        assert len(second.split()) // 2 == len(row["cuts_ms"]) > 8
    call = (small, "forward", jnp.float32, [0.75], False, 1e6, lambda: 0.0, "channel")
    (row,) = weights.measure(*call)
    assert [name.endswith("w") for name in row["cuts_ms"]] == [True, False]
    assert row["products"] == 9 * 16 * 8 * 128 / 4
    strided = convs.Problem("wrn16_8", 2, (3, 3), (16, 8), (8, 8), (4, 4), 2)
    assert not weights.refusal(strided, "forward", jnp.float32)
    assert "strides" in weights.refusal(strided, "input_gradient", jnp.float32)


def test_the_convs_of_sparse_conv_vector_and_one_line_of_its_table(load, monkeypatch):
    vectors = load("sparse_conv_vector")
    found = vectors.problems(["wrn16_8"], every=True)
    marks = {one.name for one in found if vectors.is_mark(one)}
    assert marks == {"3x3 128->128 @32", "3x3 256->256 @16", "3x3 512->512 @8"}
    monkeypatch.setattr(timing, "COUNT", 1)
    monkeypatch.setattr(timing, "REPEATS", 1)
    small = vectors.Problem("wrn16_8", 2, (3, 3), (16, 24), (8, 8), (4, 4), 2)
    assert vectors.takes(small, 8)
    assert not vectors.takes(small, 16)
    (row,) = vectors.measure(small, [8, 16], [0.75], True, (1e6, 1e6), 0.0)
    assert 0.15 < row["operations"] / small.operations < 0.35
    assert row["error"] < 2**-7
    assert set(row["cuts_ms"]) == {"4x8x128/4/32", "8x4x128/4/32"}
    first, second = vectors.lines(row)
    assert "3x3/2 16->24 @8" in first
    assert "8x4x128" in second
