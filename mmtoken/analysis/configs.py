"""Configs of mmdet, mmseg and mmpretrain: the model and the images they describe."""

from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from ..library import library_of, read_config
from .twin import mappings

DEFAULT_SHAPES = dict(mmdet=(800, 1280), mmseg=(512, 512), mmpretrain=(224, 224))


def load_config(path: str | Path) -> Config:
    """Read a config and set its ``default_scope`` to its library.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, is not for one of the libraries, or has no model.
    """
    cfg = read_config(path)
    cfg.default_scope = library_of(cfg)
    if 'model' not in cfg:
        raise ValueError(f'{path}: a config needs a `model`; this one has none')
    return cfg


def build_model(cfg: ConfigDict) -> nn.Module:
    """A model or a part of one, from the registries of the current default scope.

    Raises:
        ValueError: It cannot be built; the message says why.
    """
    try:
        return MODELS.build(cfg)
    except Exception as error:  # libraries raise anything for bad arguments
        raise ValueError(f'{cfg.get("type")} cannot be built: {error}') from error


def image_channels(model: Mapping) -> int:
    """Channels of the images that the backbone in the config of a model takes."""
    backbones = (part.get('backbone') for part in mappings(model))
    backbone = next((b for b in backbones if isinstance(b, Mapping)), {})
    return backbone.get('in_channels', 3)


def default_shape(cfg: Config) -> tuple[int, int]:
    """Height and width of the images that a config tests on, as far as it says.

    * A fixed size, if there is one.
    * For a resize that keeps proportions, the short side and a long side of at most 8/5 of it, both
      rounded up to a multiple of 32: 800 x 1280 for COCO's (1333, 800), at which the libraries
      quote costs.
    * Otherwise :data:`DEFAULT_SHAPES`.
    """
    size = (cfg.model.get('data_preprocessor') or {}).get('size')
    if size:
        return tuple(size)
    for transform in reversed(test_pipeline(cfg)):
        crop, scale = transform.get('crop_size'), transform.get('scale')
        if crop:
            return (crop, crop) if isinstance(crop, int) else tuple(crop)
        if isinstance(scale, (list, tuple)) and all(isinstance(side, int) for side in scale):
            if not transform.get('keep_ratio'):
                return tuple(reversed(scale))
            short, long = min(scale), min(max(scale), min(scale) * 8 // 5)
            return -(-short // 32) * 32, -(-long // 32) * 32
    return DEFAULT_SHAPES[cfg.default_scope]


def test_pipeline(cfg: Config) -> list[dict]:
    """The transforms of the test data set; empty if there is none."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return list(dataset.get('pipeline') or [])
