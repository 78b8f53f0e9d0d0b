"""Difficulty of the data set: three shares with guaranteed bounds."""

from dataclasses import dataclass

import numpy as np

from .scene import Instance, Scene

SMALL_SIDE = 16
"""An instance is small if the square root of its visible area is under this, in pixels."""

MIN_SMALL_SHARE = 0.20
MIN_OVERLAPPED_SHARE = 0.20
MAX_COLOUR_ACCURACY = 0.30


@dataclass(frozen=True)
class InstanceFacts:
    """Properties of an instance that make it hard or easy.

    Attributes:
        name: Its class.
        side: Square root of its visible area, in pixels.
        is_overlapped: Whether its silhouette overlaps that of another instance, so that one hides
            part of the other.
        colour: Mean RGB of its visible pixels, from 0 to 255.
    """

    name: str
    side: float
    is_overlapped: bool
    colour: tuple[float, ...]


def measure_instances(scene: Scene) -> list[InstanceFacts]:
    """Measure the instances of a scene, without crowds."""
    return [
        InstanceFacts(
            name=instance.name,
            side=float(np.sqrt(np.count_nonzero(instance.visible))),
            is_overlapped=_is_overlapped(instance, scene.instances),
            colour=tuple(scene.image[instance.visible].mean(axis=0).tolist()),
        )
        for instance in scene.instances
        if not instance.is_crowd
    ]


def measure_difficulty(train: list[InstanceFacts], val: list[InstanceFacts]) -> dict[str, float]:
    """Difficulty of both splits together.

    Returns:
        Shares from 0 to 1: ``small`` and ``overlapped`` of all instances, ``large`` of those of
        at least twice the small side, and ``colour_accuracy`` of a classifier that gives each
        val instance the class whose mean colour in train is nearest.
    """
    sides = np.array([facts.side for facts in train + val])
    return {
        'small': float(np.mean(sides < SMALL_SIDE)),
        'large': float(np.mean(sides >= 2 * SMALL_SIDE)),
        'overlapped': float(np.mean([facts.is_overlapped for facts in train + val])),
        'colour_accuracy': _colour_accuracy(train, val),
    }


def _is_overlapped(instance: Instance, instances: list[Instance]) -> bool:
    return any(
        (instance.silhouette & other.silhouette).any()
        for other in instances
        if other is not instance
    )


def _colour_accuracy(train: list[InstanceFacts], val: list[InstanceFacts]) -> float:
    names = sorted({facts.name for facts in train})
    means = np.array(
        [np.mean([facts.colour for facts in train if facts.name == name], axis=0) for name in names]
    )
    hits = [
        names[np.argmin(np.linalg.norm(means - facts.colour, axis=1))] == facts.name
        for facts in val
    ]
    return float(np.mean(hits))
