"""What all layers of one network share, said once: types, dtype, initialisers, random keys."""

from typing import Any

from flax import nnx
from flax.typing import Dtype, Initializer

from swat_jax.models import init
from swat_jax.models.layer_types import LayerTypes

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


class LayerFactory:
    """Makes the layers of one network.

    Parameters are float32; `dtype` is what conv, linear and batch norm compute in (batch statistics
    are taken in float32 whatever it is).

    Example:
      >>> from flax import nnx
      >>> from swat_jax.models.layer_types import LayerTypes
      >>> make = LayerFactory(LayerTypes(), rngs=nnx.Rngs(0))
      >>> make.conv(3, 16, 3, strides=2).kernel.shape
      (3, 3, 3, 16)
    """

    def __init__(
        self,
        layers: LayerTypes,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        batch_norm_axis_name: str | None = None,
        conv_init: Initializer | None = None,
        conv_bias: bool = False,
        zero_linear_bias: bool = False,
    ) -> None:
        """Binds what the layers share.

        Args:
          layers: the conv and linear constructors.
          rngs: source of keys: stream `params` for parameters, `dropout` for dropout.
          dtype: compute dtype; None: the dtype that input and parameters promote to.
          batch_norm_axis_name: mapped axis over which batch statistics are averaged; None: local.
          conv_init: initialiser of conv kernels; None: `init.uniform_fan_in()`.
          conv_bias: whether convs have a bias.
          zero_linear_bias: start linear biases at 0 instead of U(+-1/sqrt(fan_in)).
        """
        self._layers = layers
        self.max_pool = layers.max_pool
        self._rngs = rngs
        self._dtype = dtype
        self._axis_name = batch_norm_axis_name
        self._conv_init = conv_init or init.uniform_fan_in()
        self._conv_bias = conv_bias
        self._zero_linear_bias = zero_linear_bias

    def conv(self, inputs: int, outputs: int, kernel_size: int, *, strides: int = 1) -> Any:
        """Square NHWC convolution, padded by `kernel_size // 2` on every side.

        The padding is explicit because "SAME" pads even sizes unevenly at stride 2, which is not
        what the published networks do.
        """
        padding = kernel_size // 2
        return self._layers.conv(
            inputs,
            outputs,
            (kernel_size, kernel_size),
            strides=(strides, strides),
            padding=((padding, padding), (padding, padding)),
            use_bias=self._conv_bias,
            dtype=self._dtype,
            kernel_init=self._conv_init,
            bias_init=init.uniform_bias(kernel_size * kernel_size * inputs),
            rngs=self._rngs,
        )

    def linear(self, inputs: int, outputs: int) -> Any:
        """Fully connected layer with a bias."""
        zero = nnx.initializers.zeros_init()
        return self._layers.linear(
            inputs,
            outputs,
            dtype=self._dtype,
            kernel_init=init.uniform_fan_in(),
            bias_init=zero if self._zero_linear_bias else init.uniform_bias(inputs),
            rngs=self._rngs,
        )

    def norm_relu(self, channels: int) -> Any:
        """Batch norm over the last axis and ReLU; see `swat_jax.norm_relu`.

        A running average keeps 0.9 of its past at each step.
        """
        return self._layers.norm_relu(
            channels,
            momentum=BATCH_NORM_MOMENTUM,
            epsilon=BATCH_NORM_EPSILON,
            dtype=self._dtype,
            axis_name=self._axis_name,
            rngs=self._rngs,
        )

    def dropout(self, rate: float) -> Any:
        """Dropout with a key stream of its own."""
        return self._layers.dropout(rate, rngs=self._rngs)
