"""From a table to the layers of a network, in training, and what is said of it at its start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import (
    algorithm_table,
    build,
    config_file,
    data,
    data_parallel,
    dispatch,
    kernels,
    same_run,
    step,
    train,
    training_setup,
)
from swat_jax.algorithm_table import Table, Times
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.candidates import OPS
from swat_jax.errors import UsageError
from swat_jax.kernels import choice as kernel_choice
from tests.fake_algorithms import CALLS, add_fakes
from tests.runs import digits

DEVICE, BATCH = "Made-up 9000", 8


def network(method="u90", **overrides):
    config = digits(method, batch_size=BATCH, **overrides)
    facts = {"num_classes": 10, "image_shape": (8, 8, 1)}
    model = nnx.eval_shape(lambda: build.build(config, **facts, rngs=nnx.Rngs(0)))
    dtype = build.PRECISIONS[config.precision]
    return config, model, jax.ShapeDtypeStruct((BATCH, 8, 8, 1), dtype)


def names_of(model, x):
    """Names in a table by path, of the sparse layers."""
    layers, found = dict(build.sparse_layers(model)), dispatch.problems(model, x)
    return {
        path: dispatch.table_name(layers[path], problem)
        for path, problem in found.items()
        if dispatch.is_sparse(layers[path])
    }


def times(**chosen):
    ms = dict.fromkeys(chosen.values(), 0.5)
    return {op: Times(chosen.get(op, PLAIN[op]), {PLAIN[op]: 1.5, **ms}) for op in OPS}


def untimed(count):
    return (
        f"{count} of the 27 products of sparse layers were not timed on {DEVICE}: masked weights "
        "and cuDNN; "
        "python -m swat_jax.tune times them"
    )


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """As on a GPU with kernels, as far as tables are concerned; with tables of its own."""
    add_fakes(monkeypatch)
    for place in (kernels, kernel_choice):
        monkeypatch.setattr(place, "backend", lambda: "cuda")
    monkeypatch.setattr(kernels, "folds", lambda dtype: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(algorithm_table, "SHIPPED", tmp_path / "shipped")


def save(layers, path=None, **changes):
    table = Table(DEVICE, algorithm_table.package_version(), "cuda", layers)
    path = path or algorithm_table.path_of(DEVICE)
    algorithm_table.write(path, dataclasses.replace(table, **changes))
    return path


def test_problems_are_those_of_the_step():
    """Shapes, types and strides as the layers call their product, recorded in `functional`."""
    _, model, x = network("channel70", precision="bfloat16", sparsity__pack=True)
    found = dispatch.problems(model, x)
    assert set(found) == {path for path, _ in build.sparse_layers(model)}
    conv = found["stage2/0/conv1"]
    assert (conv.x, conv.kernel, conv.y) == ((8, 8, 8, 24), (3, 3, 24, 48), (8, 4, 4, 48))
    assert (conv.dtype, conv.granularity) == (jnp.bfloat16, "channel")
    assert conv.is_packed
    assert not found["stem"].is_packed  # it is dense
    linear = found["classifier"]
    assert (linear.x, linear.kernel) == ((8, 1, 1, 96), (1, 1, 96, 10))
    assert (linear.is_linear, linear.granularity) == (True, "unstructured")


def test_problems_equal_those_that_the_products_are_given(monkeypatch):
    seen = {}
    accepted = Algorithms.accepted

    def note(self, problem):
        seen[algorithm_table.name_of(problem, 0, 0)] = problem.is_packed
        return accepted(self, problem)

    monkeypatch.setattr(Algorithms, "accepted", note)
    config, model, x = network(precision="bfloat16", sparsity__pack=True)
    del config
    graph, state = nnx.split(model)

    def call(state, x):
        traced = nnx.merge(graph, state)
        traced.train()
        return traced(x)

    jax.eval_shape(call, state, x)
    found = dispatch.problems(model, x).values()
    assert {algorithm_table.name_of(one, 0, 0): one.is_packed for one in found} == seen
    assert len(seen) > 5


@pytest.mark.usefixtures("cuda")
def test_without_a_table_everything_is_plain_and_one_line_says_so():
    _, model, x = network()
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {PLAIN}
    assert choice.notes == (untimed(27),)
    assert dispatch.choose(model, x, "plain", DEVICE).notes == ()


def test_the_xla_backend_has_nothing_to_choose():
    _, model, x = network()
    choice = dispatch.choose(model, x, "tuned", "cpu")
    assert set(choice.algorithms.values()) == {PLAIN}
    assert choice.notes == (
        "all 9 sparse layers use masked weights and plain JAX: the backend is xla",
    )


@pytest.mark.usefixtures("cuda")
def test_layers_get_what_was_chosen_for_them_and_each_op_is_a_line():
    _, model, x = network(sparsity__pack=True)
    names = names_of(model, x)
    save({
        names["stage1/0/conv1"]: times(forward="fake:fast", weight_gradient="fake"),
        names["classifier"]: times(),
        names["stage3/0/conv2"]: times(input_gradient="fake:slow"),
    })  # fmt: skip
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    first = Algorithms(forward="fake:fast", weight_gradient="fake")
    chosen = {path: one for path, one in choice.algorithms.items() if one != PLAIN}
    # Two layers of one name.
    assert chosen == {
        "stage1/0/conv1": first,
        "stage1/0/conv2": first,
        "stage3/0/conv2": Algorithms(input_gradient="fake:slow"),
    }
    assert choice.notes == (
        "stage1/0/conv1 forward: fake:fast (0.5000 ms, masked 1.5000)",
        "stage1/0/conv1 weight_gradient: fake (0.5000 ms, dense 1.5000)",
        "stage1/0/conv2 forward: fake:fast (0.5000 ms, masked 1.5000)",
        "stage1/0/conv2 weight_gradient: fake (0.5000 ms, dense 1.5000)",
        "stage3/0/conv2 input_gradient: fake:slow (0.5000 ms, masked 1.5000)",
        untimed(15),
    )
    dispatch.apply(model, choice)
    assert {path: layer.algorithms for path, layer in build.sparse_layers(model)} == {
        "stem": PLAIN,
        **choice.algorithms,
    }
    # The same table, the same choice.
    assert dispatch.choose(model, x, "tuned", DEVICE) == choice


@pytest.mark.usefixtures("cuda")
def test_what_a_table_gives_but_cannot_be_had_is_plain_and_said():
    _, model, x = network(sparsity__pack=False)
    names = names_of(model, x)
    save({
        names["stage1/0/conv1"]: times(forward="gone", weight_gradient="fake"),
        names["classifier"]: times(forward="fake:huge"),
    })  # fmt: skip
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {PLAIN}
    assert choice.notes[0].startswith(
        "5 ops are plain against the table, the first: stage1/0/conv1 forward, not gone: "
        "forward must be one of masked, "
    )
    assert len(choice.notes) == 2


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "changed", [{"batch": 16}, {"method": "u80"}, {"precision": "bfloat16"}, {"pack": False}]
)
def test_other_layers_than_were_timed_are_plain(changed):
    _, model, x = network(sparsity__pack=True)
    save(dict.fromkeys(names_of(model, x).values(), times(forward="fake")))
    assert set(dispatch.choose(model, x, "tuned", DEVICE).algorithms.values()) == {
        Algorithms(forward="fake")
    }
    _, other, x = network(
        changed.get("method", "u90"),
        precision=changed.get("precision", "float32"),
        sparsity__pack=changed.get("pack", True),
    )
    x = jax.ShapeDtypeStruct((changed.get("batch", BATCH), *x.shape[1:]), x.dtype)
    choice = dispatch.choose(other, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {PLAIN}
    assert choice.notes[-1] == untimed(27)


@pytest.mark.usefixtures("cuda")
def test_ops_that_were_not_timed_are_plain_and_are_counted():
    _, model, x = network(sparsity__pack=True)
    part = {"forward": times(forward="fake")["forward"]}
    save(dict.fromkeys(names_of(model, x).values(), part))
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {Algorithms(forward="fake")}
    assert choice.notes[-1] == untimed(18)


@pytest.mark.usefixtures("cuda")
def test_a_stale_table_is_named_and_not_used():
    _, model, x = network()
    layers = dict.fromkeys(names_of(model, x).values(), times(forward="fake"))
    path = save(layers, version="0.0.9")
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {PLAIN}
    assert choice.notes[0].startswith(f"{path} is not used: it is of version 0.0.9, this is ")
    assert choice.notes[1] == untimed(27)


@pytest.mark.usefixtures("cuda")
def test_no_time_holds_for_budgets_that_move():
    _, model, x = network("m90")
    layers = dict(build.sparse_layers(model))
    save({
        dispatch.table_name(layers[path], problem): times(forward="fake")
        for path, problem in dispatch.problems(model, x).items()
    })  # fmt: skip
    choice = dispatch.choose(model, x, "tuned", DEVICE)
    assert set(choice.algorithms.values()) == {PLAIN}
    assert "30 of the 30 products of sparse layers were not timed" in choice.notes[0]


def test_a_table_that_is_named_is_obeyed_on_any_device(tmp_path, monkeypatch):
    add_fakes(monkeypatch)
    _, model, x = network()
    path = tmp_path / "table.json"
    layers = dict.fromkeys(names_of(model, x).values(), times(forward="fake"))
    save(layers, path, version="0.0.9")
    choice = dispatch.choose(model, x, str(path), "cpu")
    assert set(choice.algorithms.values()) == {Algorithms(forward="fake")}
    assert choice.notes[0] == f"algorithms are those of {path}, of {DEVICE}, swat_jax 0.0.9"
    assert len(choice.notes) == 10


@pytest.mark.parametrize("given", ["fast", "", None, 3, True])
def test_a_setting_that_is_none(given):
    with pytest.raises(UsageError, match=r"config\.sparsity\.algorithms must be tuned, plain or"):
        dispatch.check(given)


def test_a_setting_is_checked_before_a_run_starts(tmp_path):
    config = digits(sparsity__algorithms="none.json")
    with pytest.raises(UsageError, match=r"there is no file 'none\.json'"):
        train.train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "bad.json").write_text("{}")
    config = digits(sparsity__algorithms=str(tmp_path / "bad.json"))
    with pytest.raises(UsageError, match="is not a table of algorithms"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.newest
def test_training_computes_with_the_table_and_says_so(tmp_path, monkeypatch, capsys):
    add_fakes(monkeypatch)
    _, model, x = network(sparsity__pack=True)
    path = tmp_path / "table.json"
    ours = times(forward="fake", input_gradient="fake", weight_gradient="fake:slow")
    save(dict.fromkeys(names_of(model, x).values(), ours), path)
    config = digits(
        batch_size=BATCH, sparsity__pack=True, max_steps=1, sparsity__algorithms=str(path)
    )
    CALLS.clear()
    train.train_and_evaluate(config, tmp_path / "run")
    assert {op for op, _ in CALLS} == set(OPS)
    assert ("weight_gradient", "slow") in CALLS
    said = capsys.readouterr().err
    assert said.count("(0.5000 ms, masked 1.5000)") == 2 * 9
    assert "not timed" not in said


def test_processes_with_different_tables_do_not_train_together(monkeypatch):
    config = digits(batch_size=BATCH)
    trainer, _ = training_setup.make_trainer(
        config, data.load(config).info, data_parallel.make_mesh(1)
    )
    monkeypatch.setattr(training_setup.jax, "process_count", lambda: 2)
    gathered = {"all": lambda mark: np.stack([mark, mark])}
    monkeypatch.setattr(
        training_setup.multihost_utils, "process_allgather", lambda mark: gathered["all"](mark)
    )
    assert len(training_setup.choose_algorithms(trainer)[1]) == 1
    gathered["all"] = lambda mark: np.stack([mark, mark + 1])
    with pytest.raises(UsageError, match="have different tables; give all of them the same one"):
        training_setup.choose_algorithms(trainer)


def test_on_a_cpu_a_step_is_that_of_plain(fake_devices):
    """To the program: what is compiled is the same."""
    del fake_devices
    texts = []
    for setting in ("tuned", "plain"):
        config = digits(batch_size=BATCH, sparsity__algorithms=setting)
        info = data.load(config).info
        trainer, make_state = training_setup.make_trainer(config, info, data_parallel.make_mesh(1))
        trainer, notes = training_setup.choose_algorithms(trainer)
        assert len(notes) == (setting == "tuned")
        images = np.zeros((BATCH, 8, 8, 1), np.uint8)
        inputs = step.put_batch(trainer, images, np.zeros(BATCH, np.int32))
        texts.append(trainer.train_step.lower(make_state(), *inputs).as_text())
    assert texts[0] == texts[1]


def test_a_checkpoint_does_not_depend_on_it(tmp_path, monkeypatch):
    """Neither its arrays nor whether a run may go on from it; those of older runs have no key."""
    add_fakes(monkeypatch)
    _, model, x = network()
    path = tmp_path / "table.json"
    save(dict.fromkeys(names_of(model, x).values(), times(forward="fake")), path)
    config = digits(batch_size=BATCH, sparsity__algorithms=str(path))
    trainer, _ = training_setup.make_trainer(
        config, data.load(config).info, data_parallel.make_mesh(1)
    )
    tuned, notes = training_setup.choose_algorithms(trainer)
    assert len(notes) == 10
    assert tuned.sparse.graph != trainer.sparse.graph
    for name, types in trainer.sparse.types.items():
        assert jax.tree.structure(tuned.sparse.types[name]) == jax.tree.structure(types)
        assert jax.tree.leaves(tuned.sparse.types[name]) == jax.tree.leaves(types)
    old: dict = {"sparsity": {"weight": 0.9}}
    for setting in ("tuned", "plain", str(path)):
        same_run.check_same_run(old, {"sparsity": {"weight": 0.9, "algorithms": setting}})
    assert config_file.load("configs/digits.py:u90").sparsity.algorithms == "tuned"
