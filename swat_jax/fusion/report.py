"""What `fuse` made of a function, in words."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NormReport:
    """What became of one call of a batch norm.

    Attributes:
      name: the path of the layer, where the function was given the model; else its class and the
        number of the call.
      shape: of its input.
      fused: what is computed in one pass, in order: "batch norm" and, where they follow,
        "addition", "relu", "dropout". Empty if the layer is left as it was.
      packs_for: the SWAT layers whose saved input is packed in that pass.
      dense_for: what else reads the dense result; "the result of the function" among it.
      why: why it is left, or why no ReLU is part of the pass; empty if there is nothing to say.
    """

    name: str
    shape: tuple[int, ...]
    fused: tuple[str, ...]
    packs_for: tuple[str, ...] = ()
    dense_for: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        parts = [f"one pass of {', '.join(self.fused)}" if self.fused else "left as it is"]
        if self.packs_for:
            parts.append(f"packs for {', '.join(self.packs_for)}")
        if self.dense_for:
            parts.append(f"dense for {', '.join(self.dense_for)}")
        if self.why:
            parts.append(self.why)
        return f"{self.name} ({shape}): {'; '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of all batch norms that a function calls.

    Attributes:
      norms: in the order of the passes.
      layers: what is to be said of SWAT layers: which of them pack their input themselves.
      lost: what was not fused and could have been, were it written in another way.

    Example:
      >>> norm = NormReport("norm", (2, 4, 4, 8), ("batch norm", "relu"), packs_for=("conv",))
      >>> print(Report((norm,)))
      1 of 1 batch norms in passes of their own, 1 of them with what SWAT layers keep
      norm (2x4x4x8): one pass of batch norm, relu; packs for conv
    """

    norms: tuple[NormReport, ...] = ()
    layers: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        fused = [norm for norm in self.norms if norm.fused]
        packs = [norm for norm in fused if norm.packs_for]
        return (
            f"{len(fused)} of {len(self.norms)} batch norms in passes of their own, "
            f"{len(packs)} of them with what SWAT layers keep"
        )

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(str, self.norms), *self.layers, *self.lost])
