"""What is measured: a backbone or a model of a config, its dense twin, the library's backbone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

import mmtoken
from mmtoken.analysis.configs import build_model, image_channels
from mmtoken.analysis.cost import Cost, measure_cost
from mmtoken.analysis.library_baseline import library_baseline
from mmtoken.analysis.twin import dense_twin, find_backbone, find_sparse, our_class
from mmtoken.runtime.routing_override import replayed_routing

Part = Literal['backbone', 'model']


@dataclass(frozen=True)
class BenchmarkTarget:
    """A network to measure. It can be pickled and built in another process.

    Attributes:
        name: For tables.
        cfg: Config of the model.
        scope: Library whose registries it is built from.
        part: The backbone alone, or the model up to its raw outputs (mode ``'tensor'``).
        imports: The config's ``custom_imports``.
        routing: Arguments of :func:`mmtoken.routing_override`, such as ``dict(query_ratio=0.5)``;
            empty lets its routers choose.
    """

    name: str
    cfg: dict
    scope: str
    part: Part
    imports: dict = field(default_factory=dict)
    routing: dict = field(default_factory=dict)

    @property
    def needs_autocast(self) -> bool:
        """Whether half precision needs ``torch.autocast``: all but our backbones do."""
        return self.part == 'model' or our_class(self.cfg['backbone']) is None

    @property
    def in_channels(self) -> int:
        """Channels of the images that it takes."""
        return image_channels(self.cfg)

    def override(self) -> AbstractContextManager:
        """The context to run it in. Each one draws the same token layouts.

        Raises:
            ValueError: A ratio that is out of range, on entering.
        """
        return mmtoken.routing_override(**self.routing) if self.routing else nullcontext()

    def replay(self) -> Callable[[], AbstractContextManager]:
        """Makes contexts like :meth:`override`, for timing: layouts are drawn in the first one."""
        return replayed_routing(**self.routing) if self.routing else nullcontext

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

    def measure_cost(self, network: nn.Module, images: Tensor) -> Cost:
        """Cost of the built network per image of a batch, by part of the model or the backbone.

        Raises:
            ValueError: It makes no routing decisions that ``routing`` could override.
        """
        root = network.model if self.part == 'model' else network
        cost = measure_cost(
            network, images, root=root, batch_size=len(images), context=self.override
        )
        if self.routing and not cost.ratios:
            (name,) = self.routing
            raise ValueError(f'{self.name} has no routers whose {name} could be overridden')
        return cost


class RawOutputs(nn.Module):
    """A model of OpenMMLab, called with images alone, that returns the raw outputs of its heads."""

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
        from mmdet.structures import DetDataSample  # only detectors need samples

        shape = tuple(x.shape[2:])
        meta = dict(
            img_shape=shape, batch_input_shape=shape, pad_shape=shape, ori_shape=shape,
            scale_factor=(1.0, 1.0),
        )  # fmt: skip
        return [DetDataSample(metainfo=meta) for _ in x]


def build_target(
    cfg: Config, part: Part, ratio: float | list[float] | None = None, kind: str | None = None
) -> BenchmarkTarget:
    """The backbone of ours in a config, or the model around it or around a neck of ours.

    Args:
        cfg: From :func:`~mmtoken.analysis.configs.load_config`.
        part: The backbone alone or the model.
        ratio: What its routers are overridden with: a ratio, or one for each image of a batch.
        kind: Name of the ratio, if the caller insists on one.

    Raises:
        ValueError: There is no backbone of ours in the config (for a model, no neck either), or it
            takes no such ratio, or the ratio is out of range.
    """
    sparse = find_backbone(cfg.model) if part == 'backbone' else find_sparse(cfg.model)
    cls = our_class(sparse)
    # Without a neck it returns maps, as its twin does.
    if part == 'backbone' and sparse.get('out_type') == 'tokens':
        sparse = dict(sparse, out_type='map')
    target = _target(cfg, part, sparse, cls.__name__)
    if ratio is None:
        return target
    if cls.ratio_name is None or kind not in (None, cls.ratio_name):
        raise ValueError(f'{cls.__name__} takes {_named(cls.ratio_name)}, got {_named(kind)}')
    target = replace(target, routing={cls.ratio_name: ratio})
    with target.override():  # checks the range
        return target


def _named(kind: str | None) -> str:
    return f'a {kind}' if kind else 'no ratio'


def build_other_target(cfg: Config, part: Part, name: str) -> BenchmarkTarget:
    """The model of a config or its backbone, which need not be one of ours.

    Raises:
        ValueError: The model has no ``backbone``.
    """
    if 'backbone' not in cfg.model:
        raise ValueError(f'{name}: its model has no `backbone`, only {sorted(cfg.model)}')
    return _target(cfg, part, cfg.model.backbone, name)


def _target(cfg: Config, part: Part, backbone: dict, name: str) -> BenchmarkTarget:
    model = dict(backbone=backbone) if part == 'backbone' else cfg.model
    imports = dict(cfg.get('custom_imports') or {})
    return BenchmarkTarget(name, ConfigDict(model).to_dict(), cfg.default_scope, part, imports)


def dense_target(target: BenchmarkTarget) -> BenchmarkTarget:
    """The dense twin of a target."""
    return replace(target, name='dense twin', cfg=dense_twin(target.cfg), routing={})


def library_target(target: BenchmarkTarget) -> BenchmarkTarget | None:
    """The target with OpenMMLab's backbone in place of ours; None if there is no such backbone."""
    cfg = dense_twin(target.cfg)  # so that a neck takes maps
    try:
        backbone = find_backbone(cfg)
    except ValueError:  # only the neck is ours
        return None
    baseline = library_baseline(backbone)
    if baseline is None:
        return None
    backbone.clear()
    backbone.update(baseline)
    return replace(target, name=baseline['type'], cfg=cfg, routing={})
