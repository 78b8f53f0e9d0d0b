"""Metrics for MMEngine's runner."""

from .boundary_iou import BoundaryIoUMetric

__all__ = ['BoundaryIoUMetric']
