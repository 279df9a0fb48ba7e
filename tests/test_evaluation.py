"""Evaluation counts: ties, what is not finite, padding, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import config_file, data_parallel, feed, scoring, step, training_setup
from swat_jax.data import Info

CLASSES = 10
INFO = Info("digits", CLASSES, (8, 8, 1), 64, 0, 30, (0.3,), (0.4,), tuple("0123456789"))


@pytest.fixture(scope="module")
def trainer(fake_devices):
    config = config_file.load("configs/digits.py:dense")
    return training_setup.make_trainer(config, INFO, data_parallel.make_mesh(4))


def weights(made, logits):
    """A network that gives every image these logits: all weights 0 but the last bias."""
    _, make_state = made
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make_state))
    state["params"]["classifier"]["bias"] = jnp.asarray(logits, jnp.float32)
    return state["params"], state["batch_stats"]


def sums(made, logits, labels):
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    batch = step.put_batch(made[0], images, np.asarray(labels, np.int32))
    return {k: float(v) for k, v in made[0].eval_step(*weights(made, logits), *batch).items()}


def test_of_equal_logits_the_first_counts_as_larger(trainer):
    """As in argmax: with all equal, class 0 is predicted and 0 to 4 are the best five."""
    found = sums(trainer, np.zeros(CLASSES), list(range(CLASSES)))
    assert (found["count"], found["correct"], found["correct_top5"]) == (10, 1, 5)
    assert found["loss"] == pytest.approx(CLASSES * np.log(CLASSES), rel=1e-6)


def test_ties_behind_a_winner(trainer):
    logits = [0, 1, 0, 2, 0, 0, 0, 3, 0, 0]  # order: 7, 3, 1, then 0, 2, 4, ...
    found = sums(trainer, logits, list(range(CLASSES)))
    assert (found["correct"], found["correct_top5"]) == (1, 5)
    for label, top5 in ((7, 1), (3, 1), (1, 1), (0, 1), (2, 1), (4, 0), (9, 0)):
        found = sums(trainer, logits, [label])
        assert (found["correct"], found["correct_top5"]) == (float(label == 7), top5), label


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 9])
def test_one_logit_that_is_not_finite_makes_a_miss(trainer, value, where):
    """Whatever the label: NaN compares as false with everything and would look like a hit."""
    logits = np.zeros(CLASSES)
    logits[where] = value
    found = sums(trainer, logits, list(range(CLASSES)))
    assert (found["count"], found["correct"], found["correct_top5"]) == (10, 0, 0)
    assert not np.isfinite(found["loss"])


def test_padding_counts_for_nothing(trainer):
    """Rows of the data set's own padding, and those that 4 devices need for an even split."""
    logits = np.arange(CLASSES)[::-1]
    whole = sums(trainer, logits, [0, 5, 3])
    assert whole == sums(trainer, logits, [0, -1, 5, -1, -1, 3, -1])
    assert (whole["count"], whole["correct"], whole["correct_top5"]) == (3, 1, 2)
    assert sums(trainer, logits, [-1, -1])["count"] == 0


class TwoBatches:
    info = INFO

    def evaluate(self, split):
        assert split == "test"
        for labels in ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, -1, -1, -1, -1, -1]):
            yield {"image": np.zeros((8, 8, 8, 1), np.uint8), "label": np.array(labels, np.int32)}


def test_a_split_that_stays_on_the_device_is_read_once(trainer):
    class Arrays(TwoBatches):
        reads = 0

        def arrays(self, split):
            assert split == "train"
            return np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)

        def evaluate(self, split):
            self.reads += 1
            return super().evaluate(split)

    dataset = Arrays()
    resident = feed.Resident(trainer[0], dataset)
    first, again = (list(resident.evaluation("test")) for _ in range(2))
    assert dataset.reads == 1
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True]
    for inputs, batch in zip(first, TwoBatches().evaluate("test"), strict=True):
        np.testing.assert_array_equal(inputs[0], batch["image"])
        np.testing.assert_array_equal(inputs[1], batch["label"])


def test_means_are_over_all_images_and_not_over_batches(trainer):
    logits = np.linspace(1, -1, CLASSES)
    labels = [*range(10), 0]
    batches = feed.Stream(trainer[0], TwoBatches()).evaluation("test")
    found = scoring.evaluate(trainer[0], batches, *weights(trainer, logits))
    log_z = np.log(np.exp(logits).sum())
    assert found["loss"] == pytest.approx(np.mean(log_z - logits[labels]), rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 11)
    assert found["top5_accuracy"] == pytest.approx(6 / 11)
