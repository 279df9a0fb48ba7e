"""`fuse`"""

from swat_jax.fusion.transform import Fused, fuse
from swat_jax.fusion.report import NormReport, Report

__all__ = ["Fused", "NormReport", "Report", "fuse"]
