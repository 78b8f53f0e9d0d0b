"""Backbones by name, as in timm; for this mmdet, mmseg, mmpretrain and mmcv need not be there."""

import os
from difflib import get_close_matches
from fnmatch import filter as matching

import torch.nn as nn
from torch import Tensor

from . import backbones
from .backbones.base import TokenBackbone


class PooledFeatures(nn.Module):
    """A backbone, and the mean over the last of its maps.

    Args:
        backbone: Any of ours that returns maps.
    """

    def __init__(self, backbone: TokenBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.out_channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to vectors ``(B, num_features)``."""
        return self.backbone(x)[-1].mean(dim=(2, 3))


def list_models(pattern: str = '*') -> list[str]:
    """Names for :func:`create_model`, sorted: a backbone and an architecture of its ``arch_zoo``.

    Args:
        pattern: As in a shell, for example ``'swat_*'``.
    """
    return sorted(matching(_models(), pattern))


def create_model(
    model_name: str,
    features_only: bool = True,
    pretrained: str | os.PathLike | bool = False,
    **kwargs,
) -> TokenBackbone | PooledFeatures:
    """Build a backbone, initialized and in training mode.

    On the meta device, where tensors have no values, nothing is initialized or loaded.

    Args:
        model_name: One of :func:`list_models`.
        features_only: Return the backbone, whose result is a tuple of maps ``(B, C_i, H_i, W_i)``;
            their channels and strides are ``feature_info.channels()`` and
            ``feature_info.reduction()``. False adds a mean over the last map, as in timm with
            ``num_classes=0``; there is no classifier.
        pretrained: Path or URL of weights, in any layout that
            :func:`~mmtoken.checkpoints.load_into` knows. False for none.
        kwargs: Arguments of the backbone, such as ``out_indices`` or ``drop_path_rate``.

    Raises:
        ValueError: An unknown name, ``pretrained=True``, weights that do not fit, or bad arguments
            of the backbone.
        TypeError: The backbone has no such argument.
        OSError: There is no such file, or it cannot be downloaded.

    Example:
        >>> import torch
        >>> model = create_model('psvit_tiny', out_indices=(0, 2)).eval()
        >>> [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 96))]
        [(1, 96, 8, 12), (1, 384, 2, 3)]
        >>> model.feature_info.channels(), model.feature_info.reduction()
        ([96, 384], [8, 32])
    """
    cls, arch = find_model(model_name)
    if pretrained is True:
        raise ValueError(
            'pretrained is a path or a URL: mmtoken has no weights of its own; docs/weights.md '
            'names those that fit'
        )
    if pretrained not in (False, None):
        kwargs = dict(kwargs, init_cfg=dict(type='Pretrained', checkpoint=pretrained))
    backbone = cls(arch=arch, **kwargs)
    if not any(parameter.is_meta for parameter in backbone.parameters()):
        backbone.init_weights()
    return backbone if features_only else PooledFeatures(backbone)


def find_model(model_name: str) -> tuple[type[TokenBackbone], str]:
    """Class and architecture of a name.

    Raises:
        ValueError: No backbone has the name; the message lists those that are close.
    """
    models = _models()
    if model_name not in models:
        close = get_close_matches(str(model_name), models)
        hint = f'did you mean {", ".join(close)}? ' if close else ''
        raise ValueError(f'no model {model_name!r}; {hint}mmtoken.list_models() has all names')
    return models[model_name]


def _models() -> dict[str, tuple[type[TokenBackbone], str]]:
    """Class and architecture by name, which is the name of the class's file and of the latter."""
    classes = [getattr(backbones, name) for name in backbones.__all__]
    return {
        f'{cls.__module__.rpartition(".")[2]}_{arch}': (cls, arch)
        for cls in classes
        for arch in cls.arch_zoo
    }
