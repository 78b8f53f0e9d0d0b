"""What is measured: a backbone or a whole model of a config, its twin and its peer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from ..library import library_of, read_config
from ..runtime.routing_override import routing_override
from .peers import peer_config
from .twin import dense_twin, find_backbone, find_sparse, mappings, our_class

Part = Literal['backbone', 'model']
DEFAULT_SHAPES = dict(mmdet=(800, 1280), mmseg=(512, 512), mmpretrain=(224, 224))


@dataclass(frozen=True)
class Subject:
    """A network to measure; it can be sent to another process and built there.

    Attributes:
        name: For tables.
        cfg: Config of the model.
        scope: Library whose registries it is built from.
        part: The backbone alone, or the model up to its raw outputs (mode ``'tensor'``).
        imports: The config's ``custom_imports``.
        routing: What to override its routers with, such as ``dict(query_ratio=0.5)`` or, for the
            images of a batch in turn, ``dict(coarse_ratio=[0.2, 0.8])``; see
            :func:`mmtoken.routing_override`. Empty lets them choose.
    """

    name: str
    cfg: dict
    scope: str
    part: Part
    imports: dict = field(default_factory=dict)
    routing: dict = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether half precision needs ``torch.autocast``: all but backbones of ours do."""
        return self.part == 'model' or our_class(self.cfg['backbone']) is None

    @property
    def in_channels(self) -> int:
        """Channels of the images that it takes."""
        return image_channels(self.cfg)

    def overriding(self) -> AbstractContextManager:
        """The context to run it in; each time it is entered layouts are drawn anew, the same."""
        return routing_override(**self.routing) if self.routing else nullcontext()

    def build(self) -> nn.Module:
        """The network, with random weights, in eval mode: ``(B, C, H, W)`` to its outputs.

        Raises:
            ValueError: It cannot be built; the message says why.
        """
        if self.imports:
            import_modules_from_strings(**self.imports)
        init_default_scope(self.scope)
        torch.manual_seed(0)
        cfg = ConfigDict(self.cfg)
        network = build_model(cfg.backbone if self.part == 'backbone' else cfg)
        if self.part == 'model':
            network = RawOutputs(revert_sync_batchnorm(network), self.scope)
        network.eval()  # some backbones of mmdet return None
        return network


def image_channels(model: Mapping) -> int:
    """Channels of the images that the backbone of a model's config takes."""
    backbones = (part.get('backbone') for part in mappings(model))
    backbone = next((b for b in backbones if isinstance(b, Mapping)), {})
    return backbone.get('in_channels', 3)


def build_model(cfg: ConfigDict) -> nn.Module:
    """A model or a part of one, by the scope in force.

    Raises:
        ValueError: It cannot be built; the message says why.
    """
    try:
        return MODELS.build(cfg)
    except Exception as error:  # of whatever a library thinks of a user's arguments
        raise ValueError(f'{cfg.get("type")} cannot be built: {error}') from error


class RawOutputs(nn.Module):
    """A model of OpenMMLab that is called with images alone and returns its heads' raw outputs."""

    def __init__(self, model: nn.Module, scope: str) -> None:
        super().__init__()
        self.model = model
        self.scope = scope

    def forward(self, x: Tensor):
        """``(B, C, H, W)`` to whatever the model's heads return."""
        return self.model(x, self._samples(x), mode='tensor')

    def _samples(self, x: Tensor) -> list | None:
        if self.scope != 'mmdet':
            return None
        from mmdet.structures import DetDataSample  # only detectors are asked for it

        shape = tuple(x.shape[2:])
        meta = dict(
            img_shape=shape, batch_input_shape=shape, pad_shape=shape, ori_shape=shape,
            scale_factor=(1.0, 1.0),
        )  # fmt: skip
        return [DetDataSample(metainfo=meta) for _ in x]


def load_config(path: str | Path) -> Config:
    """Read a config of mmdet, mmseg or mmpretrain; its ``default_scope`` is then set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, is not of one of these libraries, or has no model.
    """
    cfg = read_config(path)
    cfg.default_scope = library_of(cfg)
    if 'model' not in cfg:
        raise ValueError(f'{path}: a config needs a `model`; this one has none')
    return cfg


def make_subject(cfg: Config, part: Part, routing: dict | None = None) -> Subject:
    """The backbone of ours in a config, or the model around it or around a neck of ours.

    Raises:
        ValueError: There is no backbone of ours in it; of a model, no neck either.
    """
    backbone = find_backbone(cfg.model) if part == 'backbone' else find_sparse(cfg.model)
    # Alone it hands out maps: its twin's are compared with what would else be left to a neck.
    if part == 'backbone' and backbone.get('out_type') == 'tokens':
        backbone = dict(backbone, out_type='map')
    name = our_class(backbone).__name__
    return replace(_subject(cfg, part, backbone, name), routing=routing or {})


def any_subject(cfg: Config, part: Part, name: str) -> Subject:
    """The backbone, whosesoever, or the model of a config.

    Raises:
        ValueError: The model has no ``backbone``.
    """
    if 'backbone' not in cfg.model:
        raise ValueError(f'{name}: its model has no `backbone`, only {sorted(cfg.model)}')
    return _subject(cfg, part, cfg.model.backbone, name)


def _subject(cfg: Config, part: Part, backbone: dict, name: str) -> Subject:
    model = dict(backbone=backbone) if part == 'backbone' else cfg.model
    imports = dict(cfg.get('custom_imports') or {})
    return Subject(name, ConfigDict(model).to_dict(), cfg.default_scope, part, imports)


def twin_of(subject: Subject) -> Subject:
    """The dense twin of a subject."""
    return replace(subject, name='dense twin', cfg=dense_twin(subject.cfg), routing={})


def peer_of(subject: Subject) -> Subject | None:
    """The subject with the backbone that a library offers in place of ours, None if none does."""
    cfg = dense_twin(subject.cfg)  # so that a neck takes maps
    try:
        backbone = find_backbone(cfg)
    except ValueError:  # of ours is the neck alone
        return None
    peer = peer_config(backbone)
    if peer is None:
        return None
    backbone.clear()
    backbone.update(peer)
    return replace(subject, name=peer['type'], cfg=cfg, routing={})


def default_shape(cfg: Config) -> tuple[int, int]:
    """Height and width that a config tests at, as near as it says.

    A fixed size if there is one. Of a resize that keeps proportions the short side, with a long
    side of at most 8/5 of it, both rounded up to a multiple of 32: 800 x 1280 for COCO's (1333,
    800), as the libraries quote costs. Otherwise what is usual for the library.
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
    """The transforms of the data set that a config tests on; none if it has none."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return list(dataset.get('pipeline') or [])
