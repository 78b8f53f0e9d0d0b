"""Turns a painter's drawing into an anti-aliased sprite of a given size."""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .painters import KINDS, Canvas, Colours

SUPERSAMPLING = 2
"""Samples per pixel and axis; their mean is the anti-aliased pixel."""


@dataclass(frozen=True)
class Sprite:
    """A drawn object, cropped to what it covers.

    Attributes:
        name: Its class.
        rgb: ``(h, w, 3)`` float32 colour from 0 to 255, meaningful where ``alpha > 0``.
        alpha: ``(h, w)`` float32 share of each pixel that the object covers, from 0 to 1.
        is_crowd: Whether it is a cluster of objects that is annotated as one.
    """

    name: str
    rgb: NDArray
    alpha: NDArray
    is_crowd: bool = False

    @property
    def silhouette(self) -> NDArray:
        """``(h, w)`` bool: the pixels of which the object covers half or more."""
        return self.alpha >= 0.5


def draw_sprite(
    name: str, side: float, rng: np.random.Generator, max_extent: float = np.inf
) -> Sprite:
    """Draw one object with random colours, proportions and rotation.

    Args:
        name: Class to draw.
        side: About the square root of the area it covers, in pixels.
        rng: Source of everything random in it.
        max_extent: Limit to its longer side before rotation, in pixels.
    """
    kind = KINDS[name]
    extent = min(side / np.sqrt(kind.fill), max_extent)
    angle = np.radians(rng.uniform(-kind.max_tilt, kind.max_tilt))
    squash = rng.uniform(kind.min_squash, 1)
    # The corners of the unit square reach sqrt(2) half extents from the middle.
    reach = int(np.ceil(0.75 * extent))
    steps = np.arange(2 * reach * SUPERSAMPLING, dtype=np.float32)
    offset = ((steps + 0.5) / SUPERSAMPLING - reach) / (0.5 * extent)
    x, y = np.meshgrid(offset, offset)
    canvas = Canvas(
        u=x * np.cos(angle) + y * np.sin(angle),
        v=(y * np.cos(angle) - x * np.sin(angle)) / squash,
    )
    kind.paint(canvas, draw_colours(rng), rng)

    pixels = (2 * reach, 2 * reach)
    alpha = cv2.resize(canvas.painted.astype(np.float32), pixels, interpolation=cv2.INTER_AREA)
    # Unpainted samples are black and weigh nothing, so edges keep the object's own colour.
    rgb = cv2.resize(canvas.rgb, pixels, interpolation=cv2.INTER_AREA)
    rgb = np.clip(rgb / np.maximum(alpha, 1e-6)[..., None], 0, 255)
    left, top, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    crop = np.s_[top : top + height, left : left + width]
    return Sprite(name, rgb[crop], alpha[crop])


def draw_crowd(name: str, rng: np.random.Generator) -> Sprite:
    """Draw a cluster of 14 to 24 tiny objects of one class as one sprite."""
    height, width = rng.integers(40, 64, size=2)
    rgb = np.zeros((height, width, 3), np.float32)
    alpha = np.zeros((height, width), np.float32)
    for _ in range(rng.integers(14, 25)):
        member = draw_sprite(name, rng.uniform(5, 9), rng)
        h, w = member.alpha.shape
        top, left = rng.integers(0, (height - h + 1, width - w + 1))
        spot = np.s_[top : top + h, left : left + w]
        cover = member.alpha[..., None]
        rgb[spot] += cover * (member.rgb - rgb[spot])
        alpha[spot] = np.maximum(alpha[spot], member.alpha)
    return Sprite(name, rgb, alpha, is_crowd=True)


def draw_colours(rng: np.random.Generator) -> Colours:
    """Draw the colours of an object by one rule for all classes, so that they tell nothing."""
    dim = _rgb(rng.random(), rng.uniform(0.4, 1.0), rng.uniform(0.15, 0.5))
    bright = _rgb(rng.random(), rng.uniform(0.0, 0.6), rng.uniform(0.8, 1.0))
    main, accent = (dim, bright) if rng.random() < 0.5 else (bright, dim)
    return Colours(main, accent, dark=0.5 * dim, light=0.5 * bright + 127.5)


def _rgb(hue: float, saturation: float, value: float) -> NDArray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
