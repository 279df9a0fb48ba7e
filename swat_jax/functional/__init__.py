"""SWAT convolution, linear product and batch norm: the only place with gradient rules.

For weights ``W``, input ``x`` and output gradient ``dY``, with masks by top-K magnitude:

* forward: ``Y = conv(x, W * mask(W))``; the input is dense;
* kept for the backward pass: ``x * mask(x)`` and ``W * mask(W)``, nothing dense;
* input gradient: ``conv_transpose(dY, W * mask(W))``;
* weight gradient: ``corr(x * mask(x), dY)``, dense: masked weights get gradients too, so that
  they can come back.

A bias is added outside, so its gradient is dense.

Between two products, `batch_norm_relu` makes the dense input of the next product together with its
packed form. It keeps its own input and, after an addition, one bit per value; the product keeps the
packed form. So nobody keeps the dense activation.

XLA would bring it back: it fuses packing into the backward pass, or unpacks early. Every backward
rule therefore first ties what it kept to the gradient that comes in, as `jax.checkpoint` does.

Source: SWAT (Raihan & Aamodt, NeurIPS 2020), section 3 and algorithm 1.
"""

from swat_jax.functional.normalization import BatchNormOutput, batch_norm_relu
from swat_jax.functional.pooling import max_pool
from swat_jax.functional.products import swat_conv, swat_linear
from swat_jax.functional.regularization import draw_kept, dropout

__all__ = [
    "BatchNormOutput",
    "batch_norm_relu",
    "draw_kept",
    "dropout",
    "max_pool",
    "swat_conv",
    "swat_linear",
]
