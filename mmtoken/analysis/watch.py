"""What a trained network of a config decides for images."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..engine.image_sizes import follow_image_sizes
from ..tokens.record import Decision, record_routing

RGB_FLAGS = ('_channel_conversion', 'channel_conversion', 'to_rgb')


class Watched(NamedTuple):
    """A batch, and what was decided for it.

    Attributes:
        images: What the network saw, normalised and padded, ``(B, 3, H, W)``.
        samples: The libraries' data samples, with annotations if the pipeline loads any.
        decisions: Of all blocks that choose, in their order.
    """

    images: Tensor
    samples: list
    decisions: list[Decision]


def load_model(cfg: Config, checkpoint: str | Path | None, device: str = 'cpu') -> nn.Module:
    """The model of a config, in eval mode.

    Args:
        cfg: From :func:`~mmtoken.analysis.subject.load_config`.
        checkpoint: Of a training; None leaves random weights.
        device: Where to put it.
    """
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is not None:
        load_checkpoint(model, str(checkpoint), map_location='cpu')
    follow_image_sizes(model)
    return model.to(device).eval()


def image_pipeline(cfg: Config) -> Compose:
    """The test pipeline without what loads annotations: an image file to a model's input."""
    init_default_scope(cfg.default_scope)
    transforms = cfg.test_dataloader.dataset.pipeline
    return Compose([t for t in transforms if 'Annotations' not in str(t['type'])])


def load_image(pipeline: Compose, path: str | Path) -> dict:
    """A batch of one image, for :func:`watch`."""
    return pseudo_collate([pipeline(dict(img_path=str(path), img_id=0, seg_fields=[]))])


def val_dataloader(cfg: Config) -> DataLoader:
    """The validation set as the config loads it, in this process."""
    init_default_scope(cfg.default_scope)
    return Runner.build_dataloader(
        dict(cfg.val_dataloader.to_dict(), num_workers=0, persistent_workers=False)
    )


def watch(model: nn.Module, batch: Mapping) -> Watched:
    """Run backbone and neck on a batch and note what they decide.

    Args:
        model: From :func:`load_model`.
        batch: Of a dataloader, or of :func:`load_image`.
    """
    data = model.data_preprocessor(batch, training=False)
    with torch.no_grad(), record_routing() as decisions:
        model.extract_feat(data['inputs'])
    return Watched(data['inputs'], data.get('data_samples') or [], decisions)


def to_picture(image: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """Undo a normalisation: ``(3, H, W)`` to RGB ``(H, W, 3)``, uint8."""
    image = image.cpu()
    if hasattr(preprocessor, 'mean') and getattr(preprocessor, '_enable_normalize', True):
        image = image * preprocessor.std.cpu() + preprocessor.mean.cpu()
    if not any(getattr(preprocessor, flag, False) for flag in RGB_FLAGS):
        image = image.flip(0)  # as OpenCV loads it
    return image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
