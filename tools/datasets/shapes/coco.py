"""Annotations in COCO's detection format."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools

from .classes import CLASS_IDS
from .scene import Instance

UPSAMPLING = 4
"""Contours are traced on masks enlarged by this, so that they run along pixel borders."""

TOLERANCE = 1.0
"""How far a polygon may leave the traced contour, in pixels of the enlarged mask."""


def annotate(instance: Instance, annotation_id: int, image_id: int) -> dict[str, Any]:
    """Describe the visible part of an instance.

    ``area`` and ``bbox`` belong to the segmentation as pycocotools rasterises it: polygons for
    an object, uncompressed run lengths for a crowd.
    """
    height, width = instance.visible.shape
    if instance.is_crowd:
        segmentation: Any = to_run_lengths(instance.visible)
        rle = rle_tools.frPyObjects(segmentation, height, width)
    else:
        segmentation = to_polygons(instance.visible)
        rle = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': CLASS_IDS[instance.name],
        'iscrowd': int(instance.is_crowd),
        'area': float(rle_tools.area(rle)),
        'bbox': [float(value) for value in rle_tools.toBbox(rle)],
        'segmentation': segmentation,
    }


def to_polygons(mask: NDArray) -> list[list[float]]:
    """Trace a ``(H, W)`` bool mask as polygons ``[x0, y0, x1, y1, ...]`` in pixels.

    A polygon of COCO has no holes, so a mask with one is cut through the hole into two.
    """
    enlarged = cv2.resize(
        mask.astype(np.uint8), None, fx=UPSAMPLING, fy=UPSAMPLING, interpolation=cv2.INTER_NEAREST
    )
    contours, hierarchy = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0:
            left, _, width, _ = cv2.boundingRect(contour)
            cut = round((left + width / 2) / UPSAMPLING)
            one, other = mask.copy(), mask.copy()
            one[:, cut:] = False
            other[:, :cut] = False
            return to_polygons(one) + to_polygons(other)
    outlines = (cv2.approxPolyDP(contour, TOLERANCE, closed=True) for contour in contours)
    return [
        ((outline.ravel() + 0.5) / UPSAMPLING).round(2).tolist()
        for outline in outlines
        if len(outline) >= 3
    ]


def to_run_lengths(mask: NDArray) -> dict[str, list[int]]:
    """Encode a ``(H, W)`` bool mask as COCO's uncompressed run lengths, column by column."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {'counts': counts.tolist(), 'size': list(mask.shape)}


def make_document(images: list[dict], annotations: list[dict]) -> dict[str, Any]:
    """Assemble the content of one ``instances_*.json``."""
    return {
        'info': {'description': 'Shapes: drawn scenes for mmtoken', 'version': '1.0'},
        'licenses': [{'id': 1, 'name': 'Apache-2.0', 'url': ''}],
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': class_id, 'name': name, 'supercategory': 'object'}
            for name, class_id in CLASS_IDS.items()
        ],
    }
