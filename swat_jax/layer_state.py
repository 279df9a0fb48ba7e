"""What a SWAT layer may hold besides its parameters: the types of its variables.

With ``threshold_every_steps > 1`` thresholds are state of the layer (`WeightThreshold`,
`ActivationThreshold`), and so is the age that decides on the next refresh (`ThresholdAge`). A layer
whose number of weights is not fixed (SWAT-M) holds it as a `WeightBudget`.
"""

from flax import nnx


class Threshold(nnx.Variable):
    """Smallest magnitude that is kept: a scalar that is reused between refresh steps."""


class WeightThreshold(Threshold):
    """Threshold of a layer's weights; the same on every device."""


class ActivationThreshold(Threshold):
    """Threshold of a layer's input; each device has its own, from its part of the batch."""


class NextWeightThreshold(nnx.Variable):
    """Threshold of a layer's weights that `find_weight_thresholds` found for its next call."""


class ThresholdAge(nnx.Variable):
    """int32: training steps since thresholds were recomputed; 0 means "recompute now"."""


class WeightBudget(nnx.Variable):
    """int32: how many weights the layer keeps (SWAT-M); used from the next refresh on."""


class MeasuredSparsity(nnx.Variable):
    """float32[3], of the last call: zeros in the weights and in the saved input, and losses.

    The first two are fractions; the third counts the values that were to be kept of the input, but
    were dropped for want of room.
    """
