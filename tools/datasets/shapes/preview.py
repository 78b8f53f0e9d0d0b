"""A contact sheet: scenes with their instances outlined, beside their semantic masks."""

import colorsys

import cv2
import numpy as np
from numpy.typing import NDArray

from .classes import CLASS_IDS, WALL_ID
from .scene import Scene

ZOOM = 2
GAP = 8
COLUMNS = 3
PAPER = (250, 250, 250)
WALL_COLOUR = (225, 225, 225)
CLASS_COLOURS = {
    name: tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / len(CLASS_IDS), 0.75, 0.85))
    for k, name in enumerate(CLASS_IDS)
}


def draw_contact_sheet(scenes: list[Scene]) -> NDArray:
    """Arrange scenes in rows on one ``(H, W, 3)`` uint8 RGB sheet."""
    tiles = [np.hstack([_draw_instances(scene), _draw_semantic(scene)]) for scene in scenes]
    rows = [tiles[k : k + COLUMNS] for k in range(0, len(tiles), COLUMNS)]
    width = max(tile.shape[1] for tile in tiles)
    return np.vstack([_draw_row(row, width) for row in rows])


def _draw_row(tiles: list[NDArray], width: int) -> NDArray:
    height = max(tile.shape[0] for tile in tiles)
    blank = np.full((height, width, 3), PAPER, np.uint8)
    tiles = tiles + [blank] * (COLUMNS - len(tiles))
    return np.hstack([_mount(tile, height, width) for tile in tiles])


def _mount(tile: NDArray, height: int, width: int) -> NDArray:
    """Centre a tile on paper of the given size, with half a gap on every side."""
    spare = np.array([height, width]) - tile.shape[:2]
    top, left = spare // 2 + GAP // 2
    bottom, right = spare - spare // 2 + GAP // 2
    return cv2.copyMakeBorder(tile, top, bottom, left, right, cv2.BORDER_CONSTANT, value=PAPER)


def _draw_instances(scene: Scene) -> NDArray:
    picture = _enlarge(scene.image, cv2.INTER_CUBIC)
    for instance in scene.instances:
        colour = CLASS_COLOURS[instance.name]
        mask = _enlarge(instance.visible.astype(np.uint8))
        outline, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outline, -1, colour, 1, cv2.LINE_AA)
        left, top, width, height = cv2.boundingRect(mask)
        cv2.rectangle(picture, (left, top), (left + width - 1, top + height - 1), colour, 1)
        caption = instance.name + ' crowd' * instance.is_crowd
        place = (left + 2, max(top - 3, 9))
        # A dark copy under the caption keeps it readable on any background.
        for ink, weight in (((0, 0, 0), 2), ((255, 255, 255), 1)):
            cv2.putText(
                picture, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.33, ink, weight, cv2.LINE_AA
            )
    return picture


def _draw_semantic(scene: Scene) -> NDArray:
    palette = np.zeros((256, 3), np.uint8)
    palette[WALL_ID] = WALL_COLOUR
    for name, class_id in CLASS_IDS.items():
        palette[class_id] = CLASS_COLOURS[name]
    return _enlarge(palette[scene.semantic])


def _enlarge(picture: NDArray, interpolation: int = cv2.INTER_NEAREST) -> NDArray:
    return cv2.resize(picture, None, fx=ZOOM, fy=ZOOM, interpolation=interpolation)
