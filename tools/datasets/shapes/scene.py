"""A scene: objects placed one over the other on a wall, and what of each stays visible."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .background import add_clutter, draw_wall, light
from .classes import CLASS_IDS, UNLABELLED_ID, WALL_ID
from .sprites import Sprite, draw_crowd, draw_sprite

CROWD_SHARE = 0.06
"""Share of scenes that hold a crowd."""

OVERLAP_SHARE = 0.11
"""Share of objects that have to touch an earlier one; the others have to stay clear."""

MIN_VISIBLE_SHARE = 0.25
MIN_VISIBLE_PIXELS = 14
"""An object that would leave less than this of any object in view is not placed."""

SIDE_QUANTILES = (0.0, 0.18, 0.36, 1.0)
SIDES = (8.0, 16.0, 32.0, 76.0)
"""Square roots of object areas in pixels, log-uniform between these quantiles."""

MAX_EXTENT = 0.85
"""Limit to an object's longer side, as a share of the shorter side of the scene."""

LARGEST_SIDE = 128
"""Objects are no larger in a scene whose shorter side exceeds this, in pixels."""

PLACEMENT_ATTEMPTS = 60


@dataclass
class Instance:
    """One object, or one crowd, in a scene.

    Attributes:
        name: Its class.
        is_crowd: Whether it is a cluster of objects annotated as one.
        silhouette: ``(H, W)`` bool, all of it, hidden or not.
        visible: ``(H, W)`` bool, the part that nothing covers.
    """

    name: str
    is_crowd: bool
    silhouette: NDArray
    visible: NDArray

    @property
    def least_visible(self) -> float:
        """Pixels that have to stay in view."""
        share = MIN_VISIBLE_SHARE * np.count_nonzero(self.silhouette)
        return max(share, MIN_VISIBLE_PIXELS)


@dataclass(frozen=True)
class Scene:
    """A picture and its labels.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        semantic: ``(H, W)`` uint8 class ids, 0 where a pixel is left unlabelled.
        instances: The objects, back to front.
    """

    image: NDArray
    semantic: NDArray
    instances: list[Instance]


def draw_scene(size: tuple[int, int], seed: tuple[int, ...]) -> Scene:
    """Draw the scene of a seed.

    Args:
        size: Height and width in pixels; about half the scenes have them exchanged.
        seed: Numbers that alone decide the scene: the same ones give the same pixels.
    """
    rng = np.random.default_rng(seed)
    height, width = size if rng.random() < 0.5 else size[::-1]
    # Objects and clutter gather around one point, so that the rest of most scenes is quiet.
    frame = np.array([width, height])
    centre = frame * rng.uniform(0.25, 0.75, size=2)
    spread = frame * rng.uniform(0.12, 0.3)

    image = draw_wall(height, width, rng)
    add_clutter(image, centre, spread, rng)
    instances: list[Instance] = []
    for sprite in _draw_sprites(MAX_EXTENT * min(*size, LARGEST_SIDE), rng):
        spot = _find_spot(sprite, instances, frame, centre, spread, rng)
        if spot is not None:
            image[spot] += sprite.alpha[..., None] * (sprite.rgb - image[spot])
            _add_instance(sprite, spot, instances, (height, width))
    return Scene(light(image, rng), _label(instances, (height, width), rng), instances)


def _draw_sprites(max_extent: float, rng: np.random.Generator) -> list[Sprite]:
    """Draw what a scene is to hold, roughly from large to small.

    In that order few objects vanish behind others, and the large ones still find room.
    """
    names = list(CLASS_IDS)
    sides = np.exp(np.interp(rng.random(rng.integers(5, 9)), SIDE_QUANTILES, np.log(SIDES)))
    order = np.argsort(-sides * rng.lognormal(0, 0.4, size=len(sides)))
    sprites = [draw_sprite(rng.choice(names), side, rng, max_extent) for side in sides[order]]
    if rng.random() < CROWD_SHARE:
        sprites.insert(0, draw_crowd(rng.choice(names), rng))
    return sprites


def _find_spot(
    sprite: Sprite,
    instances: list[Instance],
    frame: NDArray,
    centre: NDArray,
    spread: NDArray,
    rng: np.random.Generator,
) -> tuple[slice, slice] | None:
    """Find rows and columns for a sprite on top of the others, or None if there is no room."""
    extent = np.array(sprite.alpha.shape[::-1])
    must_touch = bool(instances) and rng.random() < OVERLAP_SHARE
    for attempt in range(PLACEMENT_ATTEMPTS):
        # The longer the search, the wider: what finds no room near the middle goes elsewhere.
        middle = rng.normal(centre, spread * (1 + attempt / 20))
        left, top = corner = np.rint(middle - extent / 2).astype(int)
        if (corner < 0).any() or (corner + extent > frame).any():
            continue
        spot = np.s_[top : top + extent[1], left : left + extent[0]]
        touches = any((other.silhouette[spot] & sprite.silhouette).any() for other in instances)
        if touches == must_touch and all(
            np.count_nonzero(other.visible)
            - np.count_nonzero(other.visible[spot] & sprite.silhouette)
            >= other.least_visible
            for other in instances
        ):
            return spot
    return None


def _add_instance(
    sprite: Sprite, spot: tuple[slice, slice], instances: list[Instance], shape: tuple[int, int]
) -> None:
    silhouette = np.zeros(shape, bool)
    silhouette[spot] = sprite.silhouette
    for other in instances:
        other.visible &= ~silhouette
    instances.append(Instance(sprite.name, sprite.is_crowd, silhouette, silhouette.copy()))


def _label(instances: list[Instance], shape: tuple[int, int], rng: np.random.Generator) -> NDArray:
    semantic = np.full(shape, WALL_ID, np.uint8)
    for instance in instances:
        semantic[instance.visible] = CLASS_IDS[instance.name]
    # Real masks have unlabelled pixels; a few specks keep their handling under test.
    for _ in range(rng.integers(2, 5)):
        top, left = rng.integers(0, np.array(shape) - 2)
        semantic[top : top + 2, left : left + 2] = UNLABELLED_ID
    return semantic
