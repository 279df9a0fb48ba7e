"""What is asked of a whole model, and what each of its layers makes of it.

A layer is a path and the shape of its kernel, so this serves Flax NNX and Linen alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from swat_jax import patterns
from swat_jax.errors import UsageError
from swat_jax.sparsity import distribution as distributions
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import thresholds, top_k

Shape = tuple[int, ...]
Filter = str | Sequence[str] | Callable[[str, Any], bool] | None
Override = float | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """How sparse one layer is.

    Attributes:
      weight_sparsity: fraction of zeros in the weights, in ``[0, 1)``.
      activation_sparsity: fraction of zeros in the saved input, in ``[0, 1)``.
      granularity: what its mask selects.
      threshold_every_steps: steps between recomputed thresholds.
      dynamic_budget: whether the number of kept weights is state that may change (SWAT-M).
    """

    weight_sparsity: float
    activation_sparsity: float
    granularity: str = "unstructured"
    threshold_every_steps: int = 1
    dynamic_budget: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether a stock layer computes the same."""
        return not (self.weight_sparsity or self.activation_sparsity or self.dynamic_budget)


_OVERRIDES = ("weight_sparsity", "activation_sparsity", "granularity", "threshold_every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The sparsity of a model, checked when it is made.

    Attributes:
      sparsity: fraction of zeros in the weights of all layers, in ``[0, 1)``.
      activation_sparsity: fraction of zeros in all saved inputs; None: that of the weights.
      distribution: "uniform", "erk" or "momentum".
      granularity: what the masks of convolutions select; those of linear layers are unstructured.
      threshold_every_steps: steps between recomputed thresholds; 1 is exact.
      dense: patterns (`swat_jax.patterns`) of layers that stay dense, weights and inputs.
      filter: patterns of the layers that become sparse, or a function ``(path, layer) -> bool``;
        None: all of them.
      overrides: pattern -> a sparsity, or a mapping with some of ``weight_sparsity``,
        ``activation_sparsity``, ``granularity``, ``threshold_every_steps``. Of several patterns
        that fit a layer the last one counts, setting by setting.
    """

    sparsity: float
    activation_sparsity: float | None = None
    distribution: str = "uniform"
    granularity: str = "unstructured"
    threshold_every_steps: int = 1
    dense: str | Sequence[str] = ()
    filter: Filter = None
    overrides: Mapping[str, Override] | None = None

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.sparsity)
        if self.activation_sparsity is not None:
            _check_sparsity("activation_sparsity", self.activation_sparsity)
        allowed = [name for name in distributions.names() if name != "dense"]
        if self.distribution not in allowed:
            raise UsageError(
                f"distribution must be one of {', '.join(allowed)}; got {self.distribution!r}"
            )
        granularities.check(self.granularity)
        thresholds.check_period(self.threshold_every_steps)
        if self.distribution == "momentum":
            self._check_momentum()
        for pattern, override in (self.overrides or {}).items():
            _check_override(f"overrides[{pattern!r}]", override)

    def _check_momentum(self) -> None:
        if self.granularity != "unstructured":
            raise UsageError(
                "granularity must be unstructured with the distribution momentum, got "
                f"{self.granularity!r}"
            )
        if self.activation_sparsity not in (None, self.sparsity):
            raise UsageError(
                f"activation_sparsity must equal sparsity ({self.sparsity}) with the distribution "
                f"momentum, where one budget serves both; got {self.activation_sparsity}"
            )

    def chosen(self, layers: Mapping[str, Any], also: Mapping[str, str] | None = None) -> list[str]:
        """The paths of the layers that `filter` takes.

        Args:
          layers: path -> layer, of all of them.
          also: other paths of shared layers -> their path in ``layers``.

        Raises:
          UsageError: a pattern fits none.
        """
        if self.filter is None:
            return list(layers)
        if callable(self.filter):
            return [path for path, layer in layers.items() if self.filter(path, layer)]
        found: set[str] = set()
        for pattern in _several(self.filter):
            found |= _select(pattern, layers, also, "filter")
        return [path for path in layers if path in found]

    def per_layer(
        self,
        shapes: Mapping[str, Shape],
        left: Collection[str] = (),
        also: Mapping[str, str] | None = None,
    ) -> dict[str, LayerSparsity]:
        """The sparsity of every layer.

        `sparsity` and `distribution` hold for the layers whose own sparsity nothing else says:
        neither `dense` nor `overrides`.

        Args:
          shapes: path -> shape of the kernel, of the layers that become sparse, in any order.
          left: paths of layers that cannot; patterns in `dense` may name them.
          also: other paths of shared layers -> their path in ``shapes`` or ``left``.

        Raises:
          UsageError: a pattern fits no layer, or settings do not go together.
        """
        own: dict[str, dict[str, Any]] = {path: {} for path in shapes}
        for pattern in _several(self.dense):
            for path in _select(pattern, [*shapes, *left], also, "dense"):
                own.get(path, {}).update(weight_sparsity=0.0, activation_sparsity=0.0)
        for pattern, override in (self.overrides or {}).items():
            for path in _select(pattern, shapes, also, "overrides"):
                own[path].update(_settings(override))
        weight = self._spread(shapes, own, "weight_sparsity", self.sparsity)
        activation = self._spread(
            shapes,
            own,
            "activation_sparsity",
            self.sparsity if self.activation_sparsity is None else self.activation_sparsity,
        )
        return {
            path: self._layer(path, shape, weight[path], activation[path], own[path])
            for path, shape in shapes.items()
        }

    def _spread(
        self, shapes: Mapping[str, Shape], own: Mapping[str, Any], key: str, amount: float
    ) -> dict[str, float]:
        free = {path: shape for path, shape in shapes.items() if key not in own[path]}
        spread = (
            distributions.erdos_renyi_kernel
            if self.distribution == "erk"
            else distributions.uniform
        )
        return {path: own[path].get(key, 0.0) for path in shapes} | spread(free, amount)

    def _layer(
        self, path: str, shape: Shape, weight: float, activation: float, own: Mapping[str, Any]
    ) -> LayerSparsity:
        # A linear layer has nothing but single weights.
        granularity = own.get("granularity", self.granularity) if len(shape) > 2 else "unstructured"
        dynamic = self.distribution == "momentum" and "weight_sparsity" not in own
        if dynamic and (granularity != "unstructured" or "activation_sparsity" in own):
            raise UsageError(
                f"overrides: {path} has a budget of single weights that serves its input too, "
                f"with the distribution momentum; got {dict(own)}. Give it a weight_sparsity of "
                "its own to take it out of the distribution"
            )
        return LayerSparsity(
            weight_sparsity=weight,
            activation_sparsity=activation,
            granularity=granularity,
            threshold_every_steps=own.get("threshold_every_steps", self.threshold_every_steps),
            dynamic_budget=dynamic,
        )


def told(left: Mapping[str, str], most: int = 10) -> str:
    """Layers that cannot be sparse by reason, in one line.

    Args:
      left: path -> reason.
      most: how many paths are named for one reason.

    Example:
      >>> told({"q": "no", "k": "no", "head": "never"}, most=1)
      'q and 1 more (no); head (never)'
    """
    by_reason: dict[str, list[str]] = {}
    for path, why in left.items():
        by_reason.setdefault(why, []).append(path or "the model")
    parts = []
    for why, paths in by_reason.items():
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        parts.append(f"{', '.join(paths[:most])}{more} ({why})")
    return "; ".join(parts)


def _select(
    pattern: str, paths: Collection[str], also: Mapping[str, str] | None, argument: str
) -> set[str]:
    """The paths that fit a pattern, by any of their names."""
    others = {name: path for name, path in (also or {}).items() if path in paths}
    found = patterns.select(pattern, [*paths, *others], argument)
    return {others.get(name, name) for name in found}


def _several(given: str | Sequence[str]) -> Sequence[str]:
    return (given,) if isinstance(given, str) else given


def _settings(override: Override) -> dict[str, Any]:
    """An override as settings; an input is as sparse as the weights unless it says otherwise."""
    given = override if isinstance(override, Mapping) else {"weight_sparsity": override}
    settings = dict(given)
    if "weight_sparsity" in settings:
        settings.setdefault("activation_sparsity", settings["weight_sparsity"])
    return settings


def _check_override(argument: str, override: Any) -> None:
    if not isinstance(override, Mapping):
        _check_sparsity(argument, override)
        return
    for key, value in override.items():
        name = f"{argument}[{key!r}]"
        if key not in _OVERRIDES:
            raise UsageError(
                f"{argument}: there is no setting {key!r}; "
                + patterns.did_you_mean(str(key), _OVERRIDES, "settings")
            )
        if key == "granularity":
            granularities.check(value)
        elif key == "threshold_every_steps":
            thresholds.check_period(value, name)
        else:
            _check_sparsity(name, value)


def _check_sparsity(argument: str, value: Any) -> None:
    # Text would be a sparsity to `top_k`, but no number to compare with.
    if isinstance(value, bool | str):
        raise UsageError(f"{argument} must be a fraction of zeros in [0, 1), got {value!r}")
    top_k.check_sparsity(value, argument)
