"""Tuning with the kernels: everything is right, and a run computes with what was chosen."""

import dataclasses

import numpy as np
import pytest

from swat_jax import algorithm_table, data, data_parallel, kernels, step, training_setup, tune
from swat_jax.algorithms import PLAIN
from swat_jax.candidates import OPS
from tests.runs import digits, needs_library

pytestmark = needs_library


@pytest.mark.parametrize("method", ["u90", "vector16-80"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_algorithm_is_right_and_trains(method, precision, tmp_path):
    """Whichever is the fastest; then every candidate in turn, whether it is or not."""
    assert kernels.backend() == "cuda"
    path = tmp_path / "table.json"
    config = digits(
        method, batch_size=64, precision=precision, sparsity__pack=True,
        sparsity__algorithms=str(path),
    )  # fmt: skip
    found = tune.tune(config, path)
    assert found["wrong"] == {}
    assert found["backend"] == "cuda"
    info = data.load(config).info
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8)

    def loss(chosen):
        table = algorithm_table.read(path)
        layers = {
            name: {op: dataclasses.replace(ops[op], chosen=chosen(op, ops[op])) for op in OPS}
            for name, ops in table.layers.items()
        }
        algorithm_table.write(path, table.with_layers(layers))
        trainer, make_state = training_setup.make_trainer(config, info, data_parallel.make_mesh(1))
        trainer, notes = training_setup.choose_algorithms(trainer)
        assert not any("not timed" in note or "against" in note for note in notes)
        inputs = step.put_batch(trainer, images, np.zeros(64, np.int32))
        state = make_state()
        state, _ = trainer.train_step(state, *inputs)
        return float(trainer.train_step(state, *inputs)[1]["loss"])

    plain = loss(lambda op, times: PLAIN[op])
    # Those that are not plain where there are any.
    others = loss(lambda op, times: [*times.milliseconds][-1])
    # The second step's loss, after one by gradients that were rounded otherwise.
    assert others == pytest.approx(plain, rel=0.1 if precision == "bfloat16" else 0.02)
