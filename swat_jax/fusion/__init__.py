"""`fuse`: networks of stock layers become what the networks of this package are.

SWAT saves memory only if nobody keeps the dense activation. A network that is written with
`flax.nnx.BatchNorm`, ``nnx.relu``, ``+`` and ``nnx.max_pool`` has them keep it. `fuse` takes a
function that calls such a network, finds in its jaxpr what follows every batch norm, and evaluates
the jaxpr anew, with one pass of `swat_jax.norm_relu.BatchNormRelu` in place of a batch norm and
what follows it. That pass packs for the SWAT layers that read its result.

The way, a file for each step:

* `marks`: layers put one equation into the trace, in place of all that they compute;
* `program`: the jaxpr as a flat list of steps, and who reads which value;
* `patterns`: ReLU, addition and max pooling in the forms that JAX gives them;
* `plan`: what becomes one pass, and for whom it packs;
* `rewrite`: evaluation by the plan;
* `transform`: `fuse` itself, and NNX objects among the arguments; `state`: what changed of them;
* `report`: what was done, in words.

Why the equation of a layer is a primitive of its own, and not a function under `jax.jit` with a
name that is looked for: JAX would differentiate and map such a function and leave the name to what
comes out, which has other operands and results. The primitive's rules say that a call that is
transformed before it is found is what the layer computes. Its parameters hold Python objects, so
the layer itself, with its options, is at hand where the program is evaluated anew; the layer's
state flows through operands and results, like that of any function.

Layers are marked only while `fuse` traces: then, and in that thread alone, the ``__call__`` of
`flax.nnx.BatchNorm`, `flax.nnx.Dropout` and the layers of this package puts the equation there.
Models and their variables are not touched, and a subclass that calls the stock method is found
too. A context that is part of JAX's cache keys (`jax.make_user_context`) keeps functions under
`jax.jit` from being taken out of a cache that knows no marks, or from going there with marks.
"""

from swat_jax.fusion.report import NormReport, Report
from swat_jax.fusion.transform import Fused, fuse

__all__ = ["Fused", "NormReport", "Report", "fuse"]
