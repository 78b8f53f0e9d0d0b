"""How each class looks: its silhouette and its inner pattern.

A painter works in the coordinates of a :class:`Canvas`: ``u`` to the right and ``v`` down, both
from -1 to 1 over the object, whatever its size and rotation in the scene. It is given random
colours that say nothing of the class, so form alone has to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Colours:
    """RGB colours of one object, each ``(3,)`` with values from 0 to 255.

    One of ``main`` and ``accent`` is dim and the other bright; ``dark`` and ``light`` are
    stronger versions of these two.
    """

    main: NDArray
    accent: NDArray
    dark: NDArray
    light: NDArray


@dataclass
class Canvas:
    """Sample points that a painter fills.

    Attributes:
        u: ``(h, w)`` float32 horizontal coordinate of every sample in the object's own frame.
        v: ``(h, w)`` float32 vertical coordinate, pointing down.
        rgb: ``(h, w, 3)`` float32 colour painted so far; 0 where nothing is.
        painted: ``(h, w)`` bool, the silhouette painted so far.
    """

    u: NDArray
    v: NDArray
    rgb: NDArray = field(init=False)
    painted: NDArray = field(init=False)

    def __post_init__(self) -> None:
        self.rgb = np.zeros((*self.u.shape, 3), np.float32)
        self.painted = np.zeros(self.u.shape, bool)

    def fill(self, where: NDArray, colour: NDArray) -> None:
        """Paint one colour, over what is there, where the ``(h, w)`` bool mask says."""
        self.rgb[where] = colour
        self.painted |= where

    def shade(self, brightness: NDArray) -> None:
        """Multiply what is painted so far by a ``(h, w)`` factor."""
        self.rgb *= brightness[..., None]


def paint_ball(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A disc with a curved band, shaded as a sphere, with a highlight."""
    u, v = canvas.u, canvas.v
    canvas.fill(np.hypot(u, v) <= 1, colours.main)
    band = np.abs(v - 0.45 * (1 - u**2)) < 0.2
    canvas.fill(band & canvas.painted, colours.accent)
    canvas.shade(1.15 - 0.45 * np.hypot(u + 0.35, v + 0.4))
    canvas.fill(np.hypot(u + 0.38, (v + 0.45) * 1.3) < 0.2, colours.light)


def paint_box(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A square parcel with a dark edge and crossed tape."""
    u, v = np.abs(canvas.u) / 0.75, np.abs(canvas.v) / 0.75
    canvas.fill((u < 1) & (v < 1), colours.dark)
    canvas.fill((u < 0.9) & (v < 0.9), colours.main)
    tape = np.minimum(u, v) < 0.17
    canvas.fill(tape & canvas.painted, colours.accent)


def paint_plate(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """Concentric rings; the squash of its kind makes them ellipses."""
    radius = np.hypot(canvas.u, canvas.v)
    rings = ((1.0, 'main'), (0.84, 'accent'), (0.72, 'main'), (0.5, 'accent'), (0.38, 'main'))
    for outer, colour in rings:
        canvas.fill(radius <= outer, getattr(colours, colour))


def paint_flag(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A pole with a waving cloth of five stripes."""
    u, v = canvas.u, canvas.v
    phase = 4 * u + rng.uniform(0, 2 * np.pi)
    across = v - 0.1 * np.sin(phase) + 0.85
    cloth = (u > -0.8) & (u < 0.95) & (across > 0) & (across < 1.1)
    canvas.fill(cloth, colours.main)
    canvas.fill(cloth & (across // 0.22 % 2 == 1), colours.accent)
    canvas.shade(1 - 0.2 * np.cos(phase))
    canvas.fill((np.abs(u + 0.82) < 0.07) & (np.abs(v) < 0.98), colours.dark)


def paint_lamp(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A pleated shade that widens downwards, a stem and a base."""
    u, v = canvas.u, canvas.v
    canvas.fill((np.abs(u) < 0.07) & (v > 0) & (v < 0.9), colours.dark)
    canvas.fill((np.hypot(u / 0.5, (v - 0.98) / 0.22) < 1) & (v < 0.98), colours.dark)
    half_width = 0.58 + 0.32 * v
    shade = (np.abs(u) < half_width) & (v > -0.95) & (v < 0.15)
    canvas.fill(shade, colours.main)
    pleats = np.floor(3.5 * (u / np.maximum(half_width, 0.1) + 1)) % 2 == 1
    canvas.fill(shade & pleats, colours.accent)
    canvas.fill(shade & (v > 0.02), colours.dark)


def paint_clock(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A light face with a dark rim, twelve ticks and two hands."""
    radius = np.hypot(canvas.u, canvas.v)
    angle = np.arctan2(canvas.v, canvas.u)
    canvas.fill(radius <= 1, colours.dark)
    canvas.fill(radius < 0.82, colours.light)
    hour = np.pi / 6
    off_tick = np.abs((angle + hour / 2) % hour - hour / 2) * radius
    canvas.fill((off_tick < 0.045) & (radius > 0.6) & (radius < 0.74), colours.dark)
    minute_hand = rng.uniform(-np.pi, np.pi)
    hour_hand = minute_hand + rng.uniform(0.4, 1.6) * np.pi
    for direction, length, half_width in ((minute_hand, 0.62, 0.06), (hour_hand, 0.42, 0.08)):
        along = radius * np.cos(angle - direction)
        across = np.abs(radius * np.sin(angle - direction))
        canvas.fill((across < half_width) & (along > -0.12) & (along < length), colours.dark)


def paint_bottle(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A slim body with shoulders, a neck with a cap, and a striped label."""
    u, v = canvas.u, canvas.v
    shoulder = np.clip((v + 0.45) / 0.3, 0, 1)
    half_width = 0.12 + 0.22 * np.sin(0.5 * np.pi * shoulder)
    canvas.fill((np.abs(u) < half_width) & (v > -0.9) & (v < 0.98), colours.main)
    label = canvas.painted & (v > 0.05) & (v < 0.7)
    canvas.fill(label, colours.accent)
    canvas.fill(label & (np.abs(v - 0.375) < 0.08), colours.main)
    canvas.shade(1.1 - 1.2 * np.abs(u + 0.1))
    canvas.fill((np.abs(u) < 0.16) & (v > -0.98) & (v < -0.75), colours.dark)
    canvas.fill((np.abs(u + 0.2) < 0.035) & (v > -0.1) & (v < 0.9), colours.light)


def paint_fan(canvas: Canvas, colours: Colours, rng: np.random.Generator) -> None:
    """A propeller of three or four swept blades around a hub."""
    radius = np.hypot(canvas.u, canvas.v)
    angle = np.arctan2(canvas.v, canvas.u) - 0.7 * radius
    blades = rng.integers(3, 5)
    turn = 2 * np.pi / blades
    # From 0 at the leading edge of a blade to 1 at the leading edge of the next.
    within = (angle % turn) / turn
    blade = (within < 0.58) & (radius < 1 - 0.5 * np.abs(within - 0.29) ** 2 / 0.29)
    canvas.fill(blade, colours.main)
    canvas.fill(blade & (within > 0.38), colours.accent)
    canvas.fill(radius < 0.27, colours.dark)
    canvas.fill(radius < 0.14, colours.light)


@dataclass(frozen=True)
class Kind:
    """A class of objects: its painter and how far its members vary.

    Attributes:
        paint: Draws one member on a canvas.
        fill: Share of the canvas that a member covers on average.
        max_tilt: Largest rotation to either side, in degrees.
        min_squash: Smallest height, as a share of the drawn height.
    """

    paint: Callable[[Canvas, Colours, np.random.Generator], None]
    fill: float
    max_tilt: float
    min_squash: float


KINDS = {
    'lamp': Kind(paint_lamp, fill=0.28, max_tilt=20, min_squash=0.8),
    'box': Kind(paint_box, fill=0.49, max_tilt=180, min_squash=0.75),
    'bottle': Kind(paint_bottle, fill=0.24, max_tilt=35, min_squash=0.8),
    'ball': Kind(paint_ball, fill=0.76, max_tilt=180, min_squash=0.95),
    'fan': Kind(paint_fan, fill=0.41, max_tilt=180, min_squash=0.9),
    'plate': Kind(paint_plate, fill=0.58, max_tilt=40, min_squash=0.5),
    'clock': Kind(paint_clock, fill=0.72, max_tilt=180, min_squash=0.85),
    'flag': Kind(paint_flag, fill=0.48, max_tilt=20, min_squash=0.8),
}
