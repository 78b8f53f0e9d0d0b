"""What data samples of OpenMMLab's models say of a batch: sizes of the images, and labels."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..layers.common.labels import note_labels
from ..layers.common.padding import note_sizes, sizes_on_map
from ..necks import GrainUnpoolNeck
from .sample_labels import labels_of_samples

Size = tuple[int, int]  # height and width, in pixels


def follow_image_sizes(model: nn.Module) -> None:
    """Pass the sizes of images from the data samples to the backbones inside a model.

    :class:`mmtoken.TokenLossHook` calls this under MMEngine's runner, in training, validation and
    test. Call it for models that run without one::

        model = init_detector(config, checkpoint)
        mmtoken.follow_image_sizes(model)

    Each time the model, or a model inside it (a student, or under test-time augmentation), is
    called with images and their data samples, :func:`sizes_of_samples` is noted on the images, see
    :func:`mmtoken.set_image_sizes`, and on the maps for a :class:`mmtoken.GrainUnpoolNeck` right
    behind the backbone. In training the labels are noted too, for losses that teach regions by
    them (:class:`mmtoken.LabelPurityLoss`). A second call of this function changes nothing.

    Args:
        model: A detector, segmentor, classifier, or a module that contains one.

    Raises:
        TypeError: There is no ``BaseModel`` of MMEngine's inside.
    """
    models = [module for module in model.modules() if isinstance(module, BaseModel)]
    if not models:
        raise TypeError(
            f'{type(model).__name__} has no BaseModel, which is called with data samples; set the '
            'sizes by mmtoken.set_image_sizes(images, sizes)'
        )
    for part in models:
        if _note_samples not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_note_samples, with_kwargs=True)
        backbone, neck = getattr(part, 'backbone', None), getattr(part, 'neck', None)
        if _starts_grained(neck) and _pass_sizes_on not in backbone._forward_hooks.values():
            backbone.register_forward_hook(_pass_sizes_on)


def sizes_of_samples(images: Any, samples: Any, size_divisor: int = 1) -> Tensor | None:
    """Sizes of the images of a batch, if their data samples have them.

    ``img_shape`` is the size of an image, if all of them are consistent with the shape of the
    batch and with other entries (``batch_input_shape``, ``padding_size``, ``img_padding_size``) or
    ``size_divisor``. An image that its pipeline has padded, as for YOLOX and RTMDet, has an
    ``img_shape`` with padding: its content has the size ``ori_shape`` times ``scale_factor``, if
    all pixels outside of it have one color.

    Args:
        images: The batch, ``(B, C, H, W)``; anything else has no sizes.
        samples: B data samples.
        size_divisor: The data preprocessor pads the sides of a batch to multiples of this.

    Returns:
        ``(B, 2)``, in pixels, or None.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not isinstance(samples, Sequence):
        return None
    if len(samples) != len(images) or not all(isinstance(s, BaseDataElement) for s in samples):
        return None
    metas = [sample.metainfo for sample in samples]
    shapes = [_pair(meta.get('img_shape')) for meta in metas]
    batch_shape = (images.shape[2], images.shape[3])
    if None in shapes or not _agree(shapes, metas, batch_shape, size_divisor):
        return None
    outer = torch.tensor(shapes, device=images.device)
    contents = [_content(*each) for each in zip(metas, shapes, strict=True)]
    if contents == shapes:
        return outer
    plain = torch.stack([_is_plain(*each) for each in zip(images, contents, shapes, strict=True)])
    return torch.where(plain[:, None], outer.new_tensor(contents), outer)


def _note_samples(model: BaseModel, args: tuple, kwargs: dict) -> None:
    """Before a call with images and data samples, of one or several branches."""
    given = dict(zip(('inputs', 'data_samples'), args, strict=False)) | kwargs
    inputs, samples = given.get('inputs'), given.get('data_samples')
    branches = [(inputs, samples)]
    if isinstance(inputs, Mapping) and isinstance(samples, Mapping):
        branches = [(images, samples.get(name)) for name, images in inputs.items()]
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    for images, of_images in branches:
        sizes = sizes_of_samples(images, of_images, divisor)
        if sizes is not None:
            note_sizes(images, sizes)
        if model.training and isinstance(images, Tensor):
            note_labels(images, partial(labels_of_samples, of_images, images.shape[-2:]))


def _pass_sizes_on(backbone: nn.Module, args: tuple, maps: Any) -> None:
    """Behind a backbone: note the sizes of images on its maps, in pixels of each map."""
    if not (args and isinstance(args[0], Tensor) and isinstance(maps, Sequence)):
        return
    for map_ in maps:
        if isinstance(map_, Tensor) and map_.ndim == 4:
            sizes = sizes_on_map(args[0], map_)
            if sizes is not None:
                note_sizes(map_, sizes)


def _starts_grained(neck: nn.Module | None) -> bool:
    """Whether a neck is, or begins with, a GrainUnpoolNeck, whose routing depends on padding."""
    if isinstance(neck, nn.Sequential) and len(neck):
        neck = neck[0]
    return isinstance(neck, GrainUnpoolNeck)


def _pair(shape: Any) -> Size | None:
    """Height and width of an ``img_shape``, which may have channels; None for anything else."""
    if not isinstance(shape, Sequence) or len(shape) < 2:
        return None
    return int(shape[0]), int(shape[1])


def _agree(shapes: list[Size], metas: list[dict], batch_shape: Size, size_divisor: int) -> bool:
    """Whether the batch can be images of these shapes, padded at the bottom and right."""
    height, width = batch_shape
    if not all(1 <= h <= height and 1 <= w <= width for h, w in shapes):
        return False
    if all('batch_input_shape' in meta for meta in metas):  # mmdet
        return all(_pair(meta['batch_input_shape']) == batch_shape for meta in metas)
    paddings = [meta.get('padding_size', meta.get('img_padding_size')) for meta in metas]
    if None not in paddings:  # mmseg: left, right, top, bottom
        return all(
            tuple(padding) == (0, width - w, 0, height - h)
            for padding, (h, w) in zip(paddings, shapes, strict=True)
        )
    longest = (max(sides) for sides in zip(*shapes, strict=True))
    return batch_shape == tuple(-(-side // size_divisor) * size_divisor for side in longest)


def _content(meta: dict, shape: Size) -> Size:
    """The largest size that an image can have without the padding of its pipeline."""
    original, factors = _pair(meta.get('ori_shape')), meta.get('scale_factor')
    if original is None or factors is None:
        return shape
    across, down = (torch.as_tensor(factors, dtype=torch.float64).flatten().tolist() * 2)[:2]
    if not (math.isfinite(across * down) and across > 0 and down > 0):
        return shape
    sides = (round(original[0] * down), round(original[1] * across))
    return tuple(max(1, min(pair)) for pair in zip(sides, shape, strict=True))


def _is_plain(image: Tensor, inner: Size, outer: Size) -> Tensor:
    """Whether all pixels inside of one size, but outside of another, have one color.

    Args:
        image: ``(C, H, W)``.
        inner, outer: Heights and widths, both from the top left.

    Returns:
        ``()``, bool.
    """
    (top, left), (bottom, right) = inner, outer
    color = image[:, bottom - 1, right - 1, None, None]
    below, beside = image[:, top:bottom, :right], image[:, :top, left:right]
    return (below == color).all() & (beside == color).all()
