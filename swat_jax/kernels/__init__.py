"""The ops that have a hand-written GPU kernel; the only door to them.

Each op is defined by its jax.numpy twin (`swat_jax.sparsity.top_k`, `swat_jax.sparsity.packing`,
`swat_jax.sparsity.compact`, `swat_jax.batch_norm`, `swat_jax.max_pool`,
`swat_jax.sparse_convolution`, `swat_jax.sparse_conv_direct`, `swat_jax.vector_convolution`). The
backend "xla" is the twin itself, compiled by XLA, and runs everywhere. The backend "cuda" calls
the kernels of `ops/` on NVIDIA GPUs, and the twin on other devices and for float64. With it goes
"fold", which is no kernel but another way to ask cuDNN for one of its own
(`swat_jax.convolution`).

Environment:
  SWAT_JAX_BACKEND: ``cuda`` or ``xla``; by default ``cuda`` where there is a GPU and the library.
  SWAT_JAX_XLA_OPS: names of ops, separated by commas, that use their twin nevertheless.
"""

from swat_jax.kernels.choice import OPS, backend, folds, packs, settled_gradient
from swat_jax.kernels.compaction import compact
from swat_jax.kernels.direct import sparse_conv_forward, sparse_conv_input_gradient
from swat_jax.kernels.dropout_bits import draw_kept
from swat_jax.kernels.max_pool import max_pool_gradient
from swat_jax.kernels.normalization import (
    Normalized,
    batch_norm_gradient,
    batch_norm_gradient_sums,
    batch_norm_relu,
    batch_norm_statistics,
)
from swat_jax.kernels.selection import (
    Selection,
    pack,
    refreshed_threshold,
    refreshed_thresholds,
    select,
    sparsify,
    threshold,
    unpack,
)
from swat_jax.kernels.vector import sparse_conv_vector_forward, vector_cuts, vector_refusal
from swat_jax.kernels.weight_gradient import sparse_conv_weight_gradient, weight_gradient_refusal

__all__ = [
    "OPS",
    "Normalized",
    "Selection",
    "backend",
    "batch_norm_gradient",
    "batch_norm_gradient_sums",
    "batch_norm_relu",
    "batch_norm_statistics",
    "compact",
    "draw_kept",
    "folds",
    "max_pool_gradient",
    "pack",
    "packs",
    "refreshed_threshold",
    "refreshed_thresholds",
    "select",
    "settled_gradient",
    "sparse_conv_forward",
    "sparse_conv_input_gradient",
    "sparse_conv_vector_forward",
    "sparse_conv_weight_gradient",
    "sparsify",
    "threshold",
    "unpack",
    "vector_cuts",
    "vector_refusal",
    "weight_gradient_refusal",
]
