"""Timing and checking algorithms, the table that comes of it, and the program."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import algorithm_table, config_file, kernels, trial, tune
from swat_jax.algorithm_table import Table, Times
from swat_jax.algorithms import PLAIN
from swat_jax.candidates import OPS, Candidate, Problem
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.sparsity import packing
from tests import fake_algorithms
from tests.runs import digits

CONV = Convolution((2, 1), ((1, 0), (1, 1)), (1, 1), (1, 1))
PROBLEM = Problem(CONV, (2, 6, 5, 8), (3, 3, 8, 16), np.dtype("float32"), is_packed=True)
LINEAR = Problem.linear((6, 8), (8, 5), np.dtype("float32"))


@pytest.fixture
def clock(monkeypatch):
    """Times of algorithms by name; what is not named is plain and takes a millisecond."""
    times = {}

    def timed(call, *operands):
        name = call.args[1] if hasattr(call, "args") else None
        return times.get(name, 1.0) + 0.25, jax.jit(call)(*operands)

    monkeypatch.setattr(trial, "timed", timed)
    monkeypatch.setattr(tune, "milliseconds", lambda call: 0.25)
    return times


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache directory of its own, and no tables that come with the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(algorithm_table, "SHIPPED", tmp_path / "shipped")
    return tmp_path


def test_the_fastest_is_chosen_if_the_margin_is_met(clock, monkeypatch):
    fake_algorithms.add_fakes(monkeypatch)
    clock |= {"fake:fast": 0.5, "fake:slow": 0.8}
    for problem in (PROBLEM, LINEAR):
        for op, times in trial.run(problem, 0.5, 0.5, 0.25).items():
            if op == "weight_gradient" and problem is LINEAR:
                assert set(times.refused) == {"fake", "sparse"}
                continue
            assert times.chosen == "fake:fast", op
            assert times.milliseconds[PLAIN[op]] == 1.0
            assert times.milliseconds["fake:slow"] == pytest.approx(0.8)
            assert not times.wrong
    clock["fake:fast"] = 0.975
    clock["fake:slow"] = 2.0
    assert {times.chosen for times in trial.run(PROBLEM, 0.5, 0.5, 0.25).values()} == {
        "masked",
        "dense",
    }
    clock["fake:fast"] = 0.965
    assert trial.run(PROBLEM, 0.5, 0.5, 0.25)["forward"].chosen == "fake:fast"
    # A hundredth of the time, but less than a microsecond.
    clock |= {None: 0.0009, "fake:fast": 0.000009}
    assert trial.run(PROBLEM, 0.5, 0.5, 0.25)["forward"].chosen == "masked"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (fake_algorithms.wrong, "its error is "),
        (fake_algorithms.nan, "its error is nan, not 6.1e-05 at most"),
        (fake_algorithms.of_another_type, r"it is float16\["),
        (lambda op: fake_algorithms.failing, "JaxRuntimeError: INTERNAL: no fast kernel"),
    ],
)
def test_what_is_wrong_is_never_chosen(call, why, clock, monkeypatch):
    refusal, variants = fake_algorithms.refusal, fake_algorithms.variants
    for op in OPS:
        candidate = Candidate(refusal, variants, call(op))
        fake_algorithms.add_fakes(monkeypatch, **{op: candidate})
    clock["fake:fast"] = 0.01
    for op, times in trial.run(PROBLEM, 0.5, 0.5, 0.25).items():
        assert times.chosen == PLAIN[op]
        assert set(times.wrong) == {"fake:fast", "fake:slow"}
        assert why.replace("\\", "") in times.wrong["fake:fast"]
        assert "\n" not in times.wrong["fake:fast"]
        assert not set(times.wrong) & set(times.milliseconds)


def test_what_refuses_is_not_called(clock, monkeypatch):
    fake_algorithms.add_fakes(monkeypatch)
    fake_algorithms.CALLS.clear()
    problem = dataclasses.replace(PROBLEM, dtype=np.dtype("float16"))
    found = trial.run(problem, 0.5, 0.5, 0.25)
    assert found["forward"].refused["fake"] == "float16 is not float32"
    assert not fake_algorithms.CALLS
    assert set(found["weight_gradient"].milliseconds) > {"dense"}  # the twin of `sparse`


@pytest.mark.parametrize(
    "problem", [PROBLEM, LINEAR, dataclasses.replace(PROBLEM, is_packed=False)]
)
def test_operands_are_as_sparse_as_the_layer(problem):
    drawn = trial.draw(problem, 0.75, 0.8)
    assert float(jnp.mean(drawn.kernel == 0)) == pytest.approx(0.75, abs=0.01)
    saved = packing.unpack(drawn.saved, drawn.least) if problem.is_packed else drawn.saved
    assert float(jnp.mean(saved == 0)) == pytest.approx(0.8, abs=0.01)
    assert drawn.x.shape == problem.x
    assert drawn.dy.shape == problem.y


def test_the_bound_is_a_rounding():
    """The plain way itself stays below it in every type, for each op."""
    for dtype in ("float32", "bfloat16", "float16"):
        problem = dataclasses.replace(PROBLEM, dtype=jnp.dtype(dtype))
        operands = trial.draw(problem, 0.5, 0.5)
        for op in OPS:
            expected = trial._reference(op, problem, operands)
            found = trial.plain(op, problem, trial.product_of(problem))(*operands.of(op))
            assert trial._what_is_wrong(found, expected, found.dtype, trial.bound(dtype)) == ""
            off = found.at[(0,) * found.ndim].add(0.1 * jnp.max(jnp.abs(found)))
            assert "its error" in trial._what_is_wrong(
                off, expected, found.dtype, trial.bound(dtype)
            )


def times(chosen=None):
    return {
        op: Times(PLAIN[op] if chosen is None else chosen[op], {PLAIN[op]: 1.5}, {"a": "b"}, {})
        for op in OPS
    }


def test_a_table_comes_back_as_it_was(tmp_path):
    table = Table("Made-up 9000", "1.2", "cuda", {"one": times()}, {"jax": "0.1"})
    path = tmp_path / "folder" / "table.json"
    algorithm_table.write(path, table)
    assert algorithm_table.read(path) == table
    more = table.with_layers({"two": times(), "one": times(dict.fromkeys(OPS, "fake"))})
    algorithm_table.write(path, more)
    assert algorithm_table.read(path).layers["one"]["forward"].chosen == "fake"
    assert [one.name for one in path.parent.iterdir()] == ["table.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the table"):
        algorithm_table.write(tmp_path / "file" / "table.json", table)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"device": 1, "version": "1", "backend": "", "layers": {}}', "\x00"),
        '{"device": "", "version": "", "backend": "", "layers": {"a": {"b": {}}}, "made_with": {}}',
    ],
)
def test_what_is_no_table_is_refused(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a table of algorithms; delete it"):
        algorithm_table.read(path)
    with pytest.raises(UsageError, match="cannot read the table"):
        algorithm_table.read(tmp_path / "none.json")


def test_where_tables_lie(cache, monkeypatch):
    monkeypatch.setattr(algorithm_table, "package_version", lambda: "3.4")
    path = algorithm_table.path_of("Made-up 9000 (80 GB)")
    assert path == cache / "cache" / "swat_jax" / "made_up_9000_80_gb-3.4.json"
    assert algorithm_table.shipped_path("Made-up 9000").name == "made_up_9000.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(algorithm_table.path_of("A")) == "/somewhere/.cache/swat_jax/a-3.4.json"


def test_the_users_table_stands_before_the_shipped_one(cache):
    version, device = algorithm_table.package_version(), "Made-up 9000"
    assert algorithm_table.find(device, "cuda") == (Table(device, version, "cuda"), [])
    fake, other = (times(dict.fromkeys(OPS, name)) for name in ("fake", "other"))
    shipped = Table(device, version, "cuda", {"a": fake, "b": fake})
    part = {"forward": other["forward"]}
    own = Table(device, version, "cuda", {"a": part, "b": other, "c": other})
    algorithm_table.write(algorithm_table.shipped_path(device), shipped)
    algorithm_table.write(algorithm_table.path_of(device), own)
    found, left = algorithm_table.find(device, "cuda")
    assert found.layers == {"a": fake | part, "b": other, "c": other}
    assert left == []
    assert algorithm_table.find("Another", "cuda")[0].layers == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "0.0.9"}, "it is of version 0.0.9, this is "),
        ({"device": "Made-up-9000"}, "it is of device Made-up-9000, this is Made-up 9000"),
        ({"backend": "xla"}, "it is of backend xla, this is cuda"),
    ],
)
def test_a_table_of_something_else_is_not_used(changes, why, cache):
    version, device = algorithm_table.package_version(), "Made-up 9000"
    stale = dataclasses.replace(Table(device, version, "cuda", {"a": times()}), **changes)
    algorithm_table.write(algorithm_table.shipped_path(device), stale)
    found, left = algorithm_table.find(device, "cuda")
    assert found.layers == {}
    assert len(left) == 1
    assert f"is not used: {why}" in left[0]


def test_shipped_tables_are_of_this_version():
    for path in algorithm_table.SHIPPED.glob("*.json"):
        table = algorithm_table.read(path)
        assert table.version == algorithm_table.package_version()
        assert algorithm_table.shipped_path(table.device) == path
        assert table.backend == "cuda"


def names(problem, **changes):
    return algorithm_table.name_of(dataclasses.replace(problem, **changes), 0.9, 0.8)


def test_layers_that_may_differ_in_time_have_different_names():
    conv = PROBLEM.conv
    different = [
        names(PROBLEM),
        names(PROBLEM, x=(4, 6, 5, 8)),
        names(PROBLEM, kernel=(3, 3, 8, 32)),
        names(PROBLEM, dtype=np.dtype("float16")),
        names(PROBLEM, granularity="vector8"),
        names(PROBLEM, is_packed=False),
        algorithm_table.name_of(PROBLEM, 0.91, 0.8),
        algorithm_table.name_of(PROBLEM, 0.9, 0.81),
        names(LINEAR),
        names(LINEAR, is_linear=False),
        *(
            names(PROBLEM, conv=dataclasses.replace(conv, **changes))
            for changes in (
                {"strides": (1, 1)},
                {"padding": "VALID"},
                {"input_dilation": (2, 1)},
                {"kernel_dilation": (2, 1)},
                {"feature_group_count": 2},
                {"precision": "highest"},
                {"preferred_element_type": jnp.float32},
            )
        ),
    ]
    assert len(set(different)) == len(different)
    same = dataclasses.replace(conv, strides=(1, 1), padding="SAME")
    explicit = dataclasses.replace(same, padding=((1, 1), (1, 1)), folds=True)
    assert names(PROBLEM, conv=same) == names(PROBLEM, conv=explicit)


def test_float32_without_tensorfloat_is_timed_apart():
    half = np.dtype(jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        assert "precision highest" in names(PROBLEM)
        assert "precision" not in names(PROBLEM, dtype=half)  # there is but one way
        given = dataclasses.replace(PROBLEM.conv, precision=jax.lax.Precision.DEFAULT)
        assert "precision highest" not in names(PROBLEM, conv=given)
    assert "precision" not in names(PROBLEM)


def run(capsys, *flags):
    config = ["--config=configs/digits.py:u90", "--config.batch_size=8", "--config.devices=1"]
    code = tune.main([*config, *flags])
    return code, *capsys.readouterr()


def test_ops_that_are_not_asked_for_stay_as_they_were(clock, cache, capsys, monkeypatch):
    fake_algorithms.add_fakes(monkeypatch)
    clock |= {"fake:fast": 0.5}
    path = cache / "table.json"
    run(capsys, "--output", str(path), "--layers", "classifier", "--ops", "forward")
    ((name, ops),) = algorithm_table.read(path).layers.items()
    assert ops["forward"].chosen == "fake:fast"
    assert list(ops) == ["forward"]
    flags = ["--json", "--output", str(path), "--layers", "classifier", "--ops", "weight_gradient"]
    code, output, _ = run(capsys, *flags)
    assert code == 0
    assert list(json.loads(output)["layers"][name]) == ["weight_gradient"]
    with pytest.raises(UsageError, match=r"ops must be some of forward, .*; got typo"):
        tune.tune(config_file.load("configs/digits.py:u90"), path, ops=["forward", "typo"])
    after = algorithm_table.read(path).layers[name]
    assert after["forward"] == ops["forward"]
    assert after["weight_gradient"].milliseconds


def test_the_program_writes_a_table_and_tells_what_it_found(clock, cache, capsys, monkeypatch):
    fake_algorithms.add_fakes(monkeypatch)
    clock |= {"fake:fast": 0.5}
    path = cache / "table.json"
    flags = ["--output", str(path), "--layers", "stage[12]/0/conv?"]
    code, output, errors = run(capsys, *flags)
    assert (code, errors) == (0, "")
    assert "stage1/0/conv1 stage1/0/conv2: conv 8x8x8x24 3x3x24x24, padding 1+1 1+1" in output
    assert "forward         masked 1.0000 ms, fake:fast 0.5000 ms, chosen: 2.00 times" in output
    assert "sparse is refused: x is not kept packed" in output
    assert output.splitlines()[-1].startswith(f"{path}: 6 ops of 3 layers are faster than the")
    table = algorithm_table.read(path)
    assert (table.device, table.backend, len(table.layers)) == ("cpu", "xla", 3)
    # Another layer is added to what is there.
    code, output, _ = run(capsys, "--json", "--output", str(path), "--layers", "classifier")
    found = json.loads(output)
    assert code == 0
    assert list(found["paths"].values()) == [["classifier"]]
    (name,) = found["layers"]
    assert name.startswith("linear 8x1x1x96 1x1x96x10, float32, unstructured 0.9")
    assert len(algorithm_table.read(path).layers) == 4
    assert run(capsys, "--quiet", *flags)[:2] == (0, "")


def test_the_program_ends_with_1_where_a_candidate_is_wrong(clock, cache, capsys, monkeypatch):
    wrong = Candidate(
        fake_algorithms.refusal, fake_algorithms.variants, fake_algorithms.wrong("forward")
    )
    fake_algorithms.add_fakes(monkeypatch, forward=wrong)
    flags = ["--output", str(cache / "table.json"), "--layers", "classifier"]
    code, output, _ = run(capsys, *flags)
    assert code == 1
    assert "fake:fast IS WRONG: its error is" in output
    assert "WRONG: linear 8x1x1x96" in output
    assert algorithm_table.read(cache / "table.json")  # the others are in it nevertheless


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to choose; --output FILE times"),
        (["--output=TMP/t.json", "--layers=stage9/*"], "--layers: no layer fits 'stage9/*'"),
        (["--output=TMP"], "cannot read the table"),
        (["--output=TMP/old.json"], "is a table of version 0.0.9, this is"),
        (["--output=/proc/none/t.json"], "cannot write the table /proc/none/t.json"),
    ],
)
def test_what_cannot_be_timed_is_said_before_the_work(flags, message, cache, capsys, monkeypatch):
    monkeypatch.setattr(trial, "run", None)
    old = Table("cpu", "0.0.9", kernels.backend())
    algorithm_table.write(cache / "old.json", old)
    code, output, errors = run(capsys, *(flag.replace("TMP", str(cache)) for flag in flags))
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("method", ["dense", "m90"])
def test_methods_without_a_sparsity_to_time(method, tmp_path):
    with pytest.raises(UsageError, match=f"nothing to time for {method}"):
        tune.tune(digits(method), tmp_path / "table.json")
    with pytest.raises(UsageError, match="--config is missing"):
        config_file.require(None)
