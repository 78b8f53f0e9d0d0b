"""What several test modules need."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmtoken.layers.common.gate import RegionGate
from mmtoken.layers.dge.block import GranularityRouter

TORCH_2_1 = torch.__version__ < '2.2'  # for the skips of what it cannot do
needs_tracing = pytest.mark.skipif(
    TORCH_2_1, reason='torch.compile and torch.export of torch 2.1 cannot trace our networks'
)


def wake(model: nn.Module) -> nn.Module:
    """Let every parameter matter and every choice be possible.

    LayerScale starts at 1e-5, norms at the identity, routers at the finest granularity, gates at
    the fine scale.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(0.2, 0.6, generator=generator))
        for module in model.modules():
            if isinstance(module, GranularityRouter):
                module.gate.weight.normal_(0, 0.3, generator=generator)
                module.gate.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, RegionGate):
                for layer in module.layers:
                    if isinstance(layer, nn.Linear):
                        layer.weight.normal_(0, 1, generator=generator)
                    if not isinstance(layer, nn.GELU):
                        layer.bias.zero_()
    return model


def stir_routers(model: nn.Module) -> nn.Module:
    """Let routers choose all granularities, and positions differ."""
    for name, parameter in model.named_parameters():
        if name.endswith('router.gate.bias'):
            nn.init.zeros_(parameter)
        elif name.endswith(('router.gate.weight', 'pos_embed')):
            nn.init.normal_(parameter)
    return model


def force_granularity(model: nn.Module, level: int) -> nn.Module:
    """Let all routers choose one granularity, whatever they see."""
    for module in model.modules():
        if isinstance(module, GranularityRouter):
            with torch.no_grad():
                module.gate.weight.zero_()
                module.gate.bias.fill_(-100)[level] = 100
    return model


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Draw every parameter from a normal distribution."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def model_of(library: str, backbone: dict, neck: dict | list[dict]) -> ConfigDict:
    """A small segmentor of mmseg or detector of mmdet on four maps of 16 channels."""
    import_modules_from_strings([f'{library}.models'])
    init_default_scope(library)
    head = dict(
        type='FPNHead', in_channels=[16] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32],
        channels=8, num_classes=3, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    model = dict(
        mmseg=dict(type='EncoderDecoder', decode_head=head, train_cfg={}, test_cfg={}),
        mmdet=dict(type='SingleStageDetector', bbox_head=dict(
            type='FCOSHead', num_classes=3, in_channels=16, feat_channels=8, stacked_convs=1,
            strides=[4, 8, 16, 32], regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)),
            norm_cfg=None,
        )),
    )[library]  # fmt: skip
    return ConfigDict(model, backbone=backbone, neck=neck)
