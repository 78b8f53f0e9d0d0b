"""The wall behind the objects: broad colour, and clutter in one busy part of it."""

import cv2
import numpy as np
from numpy.typing import NDArray

from .sprites import draw_colours


def draw_wall(height: int, width: int, rng: np.random.Generator) -> NDArray:
    """Draw a colour gradient with a soft, low-frequency texture.

    Returns:
        ``(height, width, 3)`` float32 RGB from 0 to 255.
    """
    ends = 127 + 0.55 * (rng.uniform(20, 235, size=(2, 3)) - 127)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    ramp = (x / width - 0.5) * np.cos(direction) + (y / height - 0.5) * np.sin(direction) + 0.5
    wall = ends[0] + np.clip(ramp, 0, 1)[..., None] * (ends[1] - ends[0])
    grain = rng.normal(0, rng.uniform(2, 14), size=(5, 6, 3)).astype(np.float32)
    return (wall + cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)).astype(
        np.float32
    )


def add_clutter(wall: NDArray, centre: NDArray, spread: NDArray, rng: np.random.Generator) -> None:
    """Draw lines, blobs and grids that are no object around ``centre``, in place.

    Args:
        wall: ``(H, W, 3)`` float32 RGB.
        centre: ``(2,)`` middle of the busy part as x, y in pixels.
        spread: ``(2,)`` standard deviation of positions around it, in pixels.
        rng: Source of everything random in it.
    """
    for _ in range(rng.integers(6, 16)):
        spot = rng.normal(centre, spread)
        colour = getattr(draw_colours(rng), rng.choice(['main', 'accent']))
        marks = np.zeros(wall.shape[:2], np.uint8)
        rng.choice([_line, _blob, _grid])(marks, spot, rng)
        left, top, width, height = cv2.boundingRect(marks)
        area = np.s_[top : top + height, left : left + width]
        strength = rng.uniform(0.25, 0.7) / 255 * marks[area].astype(np.float32)[..., None]
        wall[area] += strength * (colour - wall[area])


def light(image: NDArray, rng: np.random.Generator) -> NDArray:
    """Light a scene from one side with a tinted lamp, and add sensor noise.

    Args:
        image: ``(H, W, 3)`` float32 RGB from 0 to 255.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    height, width = image.shape[:2]
    tint = rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, size=3)
    slope = rng.uniform(-0.15, 0.15, size=2)
    fall_off = (
        1
        + slope[0] * np.linspace(-1, 1, height)[:, None, None]
        + slope[1] * np.linspace(-1, 1, width)[None, :, None]
    )
    noise = rng.normal(0, rng.uniform(1, 6), size=image.shape)
    return np.clip(image * tint * fall_off + noise, 0, 255).astype(np.uint8)


def _line(marks: NDArray, spot: NDArray, rng: np.random.Generator) -> None:
    reach = rng.uniform(-35, 35, size=2)
    _stroke(marks, spot - reach, spot + reach, int(rng.integers(1, 4)))


def _blob(marks: NDArray, spot: NDArray, rng: np.random.Generator) -> None:
    angles = np.linspace(0, 2 * np.pi, 9, endpoint=False)
    radii = rng.uniform(3, 14, size=9)
    outline = spot + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cv2.fillPoly(marks, [np.rint(outline).astype(np.int32)], 255, cv2.LINE_AA)


def _grid(marks: NDArray, spot: NDArray, rng: np.random.Generator) -> None:
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(4, 8)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    reach = 2 * pitch
    for step in np.arange(-2, 3) * pitch:
        _stroke(marks, spot + step * across - reach * along, spot + step * across + reach * along)
        _stroke(marks, spot + step * along - reach * across, spot + step * along + reach * across)


def _stroke(marks: NDArray, start: NDArray, end: NDArray, thickness: int = 1) -> None:
    ends = [tuple(int(c) for c in np.rint(point)) for point in (start, end)]
    cv2.line(marks, *ends, 255, thickness, cv2.LINE_AA)
