"""Routing decisions and tokens of a trained network on the images of its config."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..engine.image_sizes import follow_image_sizes, sizes_of_samples
from ..layers.common.padding import note_sizes
from ..runtime.decisions import Record, record_routing
from ..runtime.reference import reference_path
from .configs import build_model, image_channels, test_pipeline
from .macs import count_macs

TOLERANCE = 5  # how far normalizing or resizing moves values of 8-bit images out of range
RGB_FLAGS = ('_channel_conversion', 'channel_conversion', 'to_rgb')


class RecordedBatch(NamedTuple):
    """A batch and what was recorded of it.

    Attributes:
        images: Input of the network, normalized and padded, ``(B, C, H, W)``.
        samples: The libraries' data samples, with annotations if the pipeline loads any.
        decisions: Of all blocks with a router, in order, or whatever else was recorded.
        sizes: Height and width of each image without padding, in pixels, ``(B, 2)``; None if
            unknown.
    """

    images: Tensor
    samples: list
    decisions: list[Record]
    sizes: Tensor | None = None


def load_model(cfg: Config, checkpoint: str | Path | None, device: str = 'cpu') -> nn.Module:
    """The model of a config, in eval mode.

    Args:
        cfg: From :func:`~mmtoken.analysis.configs.load_config`.
        checkpoint: Of a training; None for random weights.
        device: Of the model.

    Raises:
        ValueError: It cannot be built; the message says why.
    """
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg.model))
    if checkpoint is not None:
        load_checkpoint(model, str(checkpoint), map_location='cpu')
    follow_image_sizes(model)
    return model.to(device).eval()


def image_pipeline(cfg: Config) -> Compose:
    """The test pipeline without the loading of annotations: an image file to a model's input.

    Raises:
        ValueError: The config has none.
    """
    init_default_scope(cfg.default_scope)
    transforms = test_pipeline(cfg)
    if not transforms:
        raise ValueError('the config has no test_dataloader.dataset.pipeline to load images with')
    return Compose([t for t in transforms if 'Annotations' not in str(t['type'])])


def load_image(pipeline: Compose, path: str | Path) -> dict:
    """A batch of one image, for :func:`record_batch`.

    Raises:
        ValueError: The file is no image.
    """
    try:
        sample = pipeline(dict(img_path=str(path), img_id=0, seg_fields=[]))
    except AssertionError as error:  # of mmcv
        raise ValueError(error) from error
    return pseudo_collate([sample])


def val_dataloader(cfg: Config) -> DataLoader:
    """The validation set as the config loads it, in this process.

    Raises:
        ValueError: The config has none.
    """
    if not cfg.get('val_dataloader'):
        raise ValueError('the config has no val_dataloader')
    init_default_scope(cfg.default_scope)
    return Runner.build_dataloader(
        dict(cfg.val_dataloader.to_dict(), num_workers=0, persistent_workers=False)
    )


def check_channels(cfg: Config, batch: Mapping) -> None:
    """Check that images have the channels that the network of a config takes.

    Args:
        cfg: Config of the network.
        batch: From a dataloader or :func:`load_image`.

    Raises:
        ValueError: They have not; the message says which settings disagree.
    """
    taken = image_channels(cfg.model)
    mean = (cfg.model.get('data_preprocessor') or {}).get('mean')
    values = taken if mean is None or len(mean) == 1 else len(mean)
    for image in batch['inputs']:
        if not image.shape[0] == taken == values:
            normalised = '' if mean is None else f', data_preprocessor.mean has {len(mean)} values'
            raise ValueError(
                f'the pipeline loads images of {image.shape[0]} channels{normalised}, and '
                f'backbone.in_channels is {taken}: they must agree'
            )


def record_batch(
    model: nn.Module,
    batch: Mapping,
    record: Callable[[], AbstractContextManager[list]] = record_routing,
) -> RecordedBatch:
    """Run backbone and neck on a batch and record what they do.

    Args:
        model: From :func:`load_model`, or any detector, segmentor or classifier in eval mode.
        batch: From a dataloader or :func:`load_image`.
        record: What to record: :func:`~mmtoken.runtime.decisions.record_routing` or
            :func:`~mmtoken.runtime.decisions.record_tokens`.
    """
    data = model.data_preprocessor(batch, training=False)
    images, samples = data['inputs'], data.get('data_samples') or []
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    sizes = sizes_of_samples(images, samples, divisor)
    if sizes is not None:
        note_sizes(images, sizes)
    with torch.no_grad(), record() as decisions:
        model.extract_feat(images)
    return RecordedBatch(images, samples, decisions, sizes)


def backbone_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of backbone and neck for these very images, on the reference path."""
    with reference_path():
        return count_macs(model.extract_feat, images)


def to_picture(image: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """Undo the normalization of an image, to show it.

    One channel is shown in gray. Two channels, or more than three, have no known colors: their
    mean is shown, each normalized, so that they have equal weight.

    Args:
        image: ``(C, H, W)``, normalized.
        preprocessor: The data preprocessor that normalized it.

    Returns:
        RGB ``(H, W, 3)``, uint8. Values of images that are not 8-bit, such as satellite images, are
        stretched to the range from black to white.
    """
    image = image.float().cpu()
    if len(image) not in (1, 3):
        image = _stretch(image.mean(dim=0, keepdim=True))
    elif hasattr(preprocessor, 'mean') and getattr(preprocessor, '_enable_normalize', True):
        image = image * preprocessor.std.cpu() + preprocessor.mean.cpu()
    low, high = image.min(), image.max()
    if low < -TOLERANCE or high > 255 + TOLERANCE or high <= 1:
        image = _stretch(image)
    if not any(getattr(preprocessor, flag, False) for flag in RGB_FLAGS):
        image = image.flip(0)  # as OpenCV loads it
    return image.expand(3, -1, -1).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _stretch(image: Tensor) -> Tensor:
    """Scale the lowest value to 0 and the highest to 255."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp(min=torch.finfo().tiny) * 255
