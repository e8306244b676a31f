"""Reads a run directory; writes one page, tables and images. Imports nothing of training."""

from lvrpo.report.grids import Tile, image_grid
from lvrpo.report.page import build_report
from lvrpo.report.tables import compare_runs

__all__ = ["Tile", "build_report", "compare_runs", "image_grid"]
