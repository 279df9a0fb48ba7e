"""SWAT in Linen modules that know nothing of it: their products are replaced while they are called.

::

    model = swat_jax.linen.sparsify(MyModule(), sparsity=0.9, distribution="erk")
    variables = model.init(jax.random.key(0), x)          # the parameters of MyModule().init

    def loss(params):
        return loss_of(model.apply({"params": params}, x), labels)

    model.eval().apply(variables, x)                      # exact masks, dense activations
    MyModule().apply(model.prune(variables), x)           # the same, without SWAT
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, traverse_util
from flax import linen as nn
from flax.core.scope import DenyList, subtract_filters, union_filters
from flax.linen.dtypes import promote_dtype

from swat_jax.errors import UsageError
from swat_jax.linen.layers import SwatConv, SwatDense, keep_kernel_dtype, product
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import top_k
from swat_jax.sparsity.per_layer import Filter, LayerSparsity, Override, Request, told

_NO_SWAT_FORM = (nn.ConvTranspose, nn.ConvLocal, nn.DenseGeneral, nn.Einsum)
_CHANGE_KERNELS = (nn.WeightNorm, nn.SpectralNorm)
_PRODUCT_FIELDS: dict[type[nn.Module], str] = {
    nn.Conv: "conv_general_dilated",
    nn.Dense: "dot_general",
}
_record_number = itertools.count()


def sparsify(
    module: nn.Module,
    *,
    sparsity: float,
    activation_sparsity: float | None = None,
    distribution: str = "uniform",
    granularity: str = "unstructured",
    threshold_every_steps: int = 1,
    dense: str | Sequence[str] = (),
    filter: Filter = None,  # noqa: A002 - as in `swat_jax.sparsify`
    overrides: Mapping[str, Override] | None = None,
) -> SparseModule:
    """A module whose `nn.Conv` and `nn.Dense` layers compute as SWAT layers when it is applied.

    Its code does not change, and its parameters are those of ``module``: a checkpoint of one fits
    the other. With ``threshold_every_steps > 1`` its convolutions have variables in the collection
    ``thresholds`` besides, which a training step must declare mutable; `init` makes them, and so
    does the first such `apply`.

    Which layers there are shows when the module is called: `init` finds out, or else the first
    `apply`, by an abstract call, and spreads the sparsity over all that it reaches. What cannot be
    a SWAT layer (a layer with a call, a product or a mask of its own, within `nn.WeightNorm`,
    `nn.ConvTranspose`, `nn.DenseGeneral`, `nn.Einsum`) is left as it is, and named with the reason
    in one warning.

    Paths are those of the parameters, such as ``stage1_0/Conv_1``. Of activations the largest are
    kept over the whole tensor that a layer sees; under `jax.vmap` that is one example.

    Args:
      module: any Linen module, unbound.
      sparsity: see `swat_jax.sparsify`, also for all that follows.
      activation_sparsity: see there.
      distribution: ``uniform`` or ``erk``; "momentum" is for NNX models.
      granularity: see there.
      threshold_every_steps: see there.
      dense: see there.
      filter: see there; a function gets the layer while it is called, that is, bound.
      overrides: see there.

    Raises:
      UsageError: a value out of range. `init` and `apply`: a pattern that fits no layer, no layer
        that can be sparse.

    Example:
      >>> import swat_jax.linen
      >>> module = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(32, (3, 3))])
      >>> model = swat_jax.linen.sparsify(module, sparsity=0.9, dense="layers_0")
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> model.apply(variables, x).shape
      (1, 8, 8, 32)
      >>> int((model.prune(variables)["params"]["layers_2"]["kernel"] != 0).sum())
      461
    """
    if distribution == "momentum":
        raise UsageError(
            "distribution must be uniform or erk for Linen modules, got 'momentum': its budgets "
            "are state that only swat_jax.sparsify has, for NNX models"
        )
    request = Request(
        sparsity=sparsity,
        activation_sparsity=activation_sparsity,
        distribution=distribution,
        granularity=granularity,
        threshold_every_steps=threshold_every_steps,
        dense=dense,
        filter=filter,
        overrides=overrides,
    )
    return SparseModule(module, request)


@dataclasses.dataclass
class _Plan:
    """What the layers of a module are to be, once it is known which ones there are.

    Attributes:
      seen: paths of all layers that a call reached; None before one.
      layers: the sparsity of those that are sparse.
      shapes: of their kernels.
    """

    seen: frozenset[str] | None = None
    layers: Mapping[str, LayerSparsity] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseModule:
    """A Linen module under SWAT, made by `sparsify`; used like the module itself.

    Attributes:
      module: what it was made of, for all that SWAT does not touch.
      request: the sparsity that was asked for.
      deterministic: whether it computes as in evaluation; `train` and `eval` give the other one.
    """

    module: nn.Module
    request: Request
    deterministic: bool = False
    _plan: _Plan = dataclasses.field(default_factory=_Plan, repr=False)

    def train(self) -> SparseModule:
        """The same in training mode, as it comes from `sparsify`."""
        return dataclasses.replace(self, deterministic=False)

    def eval(self) -> SparseModule:
        """The same in evaluation mode: exact masks, dense activations, and no variable changes."""
        return dataclasses.replace(self, deterministic=True)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.init`; spreads the sparsity over the layers that are called."""
        return self.init_with_output(rngs, *args, **kwargs)[1]

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.init_with_output`, see `init`."""

        def call(mark: str) -> Any:
            mutable = _marked(kwargs.get("mutable", DenyList("intermediates")), mark)
            return self.module.init_with_output(rngs, *args, **{**kwargs, "mutable": mutable})

        self._make_plan(call)
        with self._sparse() as mark:
            return call(mark)

    def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`.

        Raises:
          UsageError: a layer is called that no call before had reached, so that it has no share in
            the distribution. `init`, or the first `apply`, must reach all layers.
        """

        def call(mark: str) -> Any:
            marked = _marked(mutable, mark)
            return self.module.apply(variables, *args, mutable=marked, **kwargs)

        if self._plan.seen is None:
            self._make_plan(call)
        with self._sparse() as mark:
            result = call(mark)
        # With nothing mutable but the mark, the user did not ask for variables.
        return result[0] if mutable is False else result

    def per_layer(self) -> dict[str, LayerSparsity]:
        """How sparse each layer is, by path; of those that are sparse.

        Raises:
          UsageError: neither `init` nor `apply` was called.
        """
        self._check_planned()
        return dict(self._plan.layers)

    def prune(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables for the module itself, with exact zeros off the masks.

        Args:
          variables: with the collection ``params``.

        Returns:
          Nested dicts of the same, without the collection ``thresholds``.

        Raises:
          UsageError: neither `init` nor `apply` was called; or kernels of a stack of layers whose
            axis is not the first.
        """
        self._check_planned()
        flat: Any = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
        for path, settings in self._plan.layers.items():
            name, shape = f"{path}/kernel".lstrip("/"), self._plan.shapes[path]
            units = granularities.units(shape, settings.granularity)
            keep = top_k.keep_count(settings.weight_sparsity, units)
            prune = functools.partial(
                granularities.pruned, shape=shape, granularity=settings.granularity, keep=keep
            )
            # A kernel may lie in a box that says how it is partitioned.
            flat[name] = jax.tree.map(prune, flat[name])
        params = traverse_util.unflatten_dict(flat, sep="/")
        rest = {k: v for k, v in variables.items() if k not in ("params", "thresholds")}
        return {"params": params, **rest}

    def _check_planned(self) -> None:
        if self._plan.seen is None:
            raise UsageError(
                "which layers there are shows in init or apply: call one of them first"
            )

    def _make_plan(self, call: Callable[[str], Any]) -> None:
        """Finds the layers that a call reaches, without computing it, and spreads the sparsity."""
        layers: dict[str, nn.Module] = {}
        reasons: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        changes_kernels: list[nn.Module] = []  # the calls that we are inside of

        def record(
            next_fun: Callable[..., Any],
            args: Any,
            kwargs: Any,
            context: nn.module.InterceptorContext,
        ) -> Any:
            layer: Any = context.module
            if context.method_name != "__call__" or not _is_candidate(layer):
                with contextlib.ExitStack() as stack:
                    if isinstance(layer, _CHANGE_KERNELS):
                        changes_kernels.append(layer)
                        stack.callback(changes_kernels.pop)
                    return next_fun(*args, **kwargs)
            result = next_fun(*args, **kwargs)
            path = "/".join(layer.path)
            kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
            layers[path], shapes[path] = layer, getattr(kernel, "shape", ())
            reasons[path] = _why_not(layer, kernel)
            if changes_kernels and not reasons[path]:
                reasons[path] = f"{type(changes_kernels[-1]).__name__} changes its kernel"
            return result

        with nn.intercept_methods(record):
            jax.eval_shape(lambda: call(f"swat_jax: record {next(_record_number)}"))
        if not layers:
            raise UsageError("module has no layer that could be sparse: no nn.Conv and no nn.Dense")
        chosen = self.request.chosen(layers)
        left = {path: reasons[path] for path in chosen if reasons[path]}
        sparse = {path: shapes[path] for path in chosen if not reasons[path]}
        if not sparse:
            why = told(left) if left else "filter takes none"
            raise UsageError(f"module has no layer that can be sparse: {why}")
        wanted = self.request.per_layer(sparse, left)
        if left:
            warnings.warn(f"left as they are: {told(left)}", UserWarning, stacklevel=4)
        self._plan.seen = frozenset(layers)
        self._plan.layers = {path: one for path, one in wanted.items() if not one.is_dense}
        self._plan.shapes = sparse

    @contextlib.contextmanager
    def _sparse(self) -> Iterator[str]:
        """Replaces the products of layers; gives the mark of what it does."""
        plan, seen = self._plan, self._plan.seen
        assert seen is not None

        def replace(
            next_fun: Callable[..., Any],
            args: Any,
            kwargs: Any,
            context: nn.module.InterceptorContext,
        ) -> Any:
            layer: Any = context.module
            if context.method_name != "__call__" or not _is_candidate(layer):
                return next_fun(*args, **kwargs)
            path = "/".join(layer.path)
            if path not in seen:
                raise UsageError(
                    f"the layer {path} has no share in the sparsity: the call that spread it did "
                    "not reach it. Call init, or apply for the first time, with all layers in use"
                )
            if path not in plan.layers:
                return next_fun(*args, **kwargs)
            with _replaced(layer, product(layer, plan.layers[path], self.deterministic)):
                try:
                    return next_fun(*args, **kwargs)
                except errors.ScopeCollectionNotFound as error:
                    if "thresholds" not in str(error):
                        raise
                    raise UsageError(
                        f"the layer {path} is within nn.scan or nn.vmap, which does not carry the "
                        "collection 'thresholds': add it to its variable_axes "
                        "({'params': 0, 'thresholds': 0}), or leave threshold_every_steps at 1"
                    ) from error

        with nn.intercept_methods(replace):
            yield f"swat_jax: {self.deterministic} {plan.layers}"


def _is_candidate(layer: nn.Module) -> bool:
    """Whether `sparsify` is about layers of this kind; not about those of SWAT made by hand."""
    by_hand = isinstance(layer, SwatConv | SwatDense) or (
        isinstance(layer.parent, SwatConv | SwatDense)
    )
    return isinstance(layer, (nn.Conv, nn.Dense, *_NO_SWAT_FORM)) and not by_hand


def _why_not(layer: Any, kernel: Any) -> str:
    """Why a layer cannot be sparse; empty if it can."""
    name = type(layer).__name__
    if isinstance(layer, _NO_SWAT_FORM):
        return f"{name} has no SWAT form"
    stock = nn.Conv if isinstance(layer, nn.Conv) else nn.Dense
    if type(layer).__call__ is not stock.__call__:
        return f"its class {name} has a __call__ of its own"
    if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
        return "its kernel is no array of floats"
    if kernel.size == 0 or not 2 <= kernel.ndim <= 5:
        return f"its kernel has the shape {kernel.shape}"
    if getattr(layer, "mask", None) is not None:
        return "it has a mask of its own"
    field = _PRODUCT_FIELDS[stock]
    for own in (field, f"{field}_cls"):
        if getattr(layer, own) is not None:
            return f"it has a {own} of its own"
    return ""


@contextlib.contextmanager
def _replaced(layer: Any, own_product: Callable[..., jax.Array]) -> Iterator[None]:
    """Gives a layer another product for one call. It lives no longer than the call of its model."""
    field = _PRODUCT_FIELDS[nn.Conv if isinstance(layer, nn.Conv) else nn.Dense]
    new: dict[str, Any] = {field: own_product}
    # The stock function would round the kernel before its mask is taken.
    if layer.promote_dtype is promote_dtype:
        new["promote_dtype"] = keep_kernel_dtype
    old = {name: getattr(layer, name) for name in new}
    for name, value in new.items():
        object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            object.__setattr__(layer, name, value)


def _marked(mutable: Any, mark: str) -> Any:
    """What is mutable, and a collection that there is not.

    What `nn.jit` has compiled is found again by the module and what is mutable, and it has the
    products that the layers had then. So each way of replacing them has a mark of its own.
    """
    if mutable is True or isinstance(mutable, DenyList):
        return subtract_filters(mutable, mark)
    return union_filters(mutable, mark)
