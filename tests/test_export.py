"""Exported networks compute what they do in PyTorch."""

import pytest
import torch
from torch import nn

from mmtoken.backbones import (
    DGEDPVT,
    DGEDeiT,
    MergeViT,
    MSViT,
    PSViT,
    STViTDeiT,
    STViTRSwin,
    SWATDeiT,
    SWATSwin,
)  # fmt: skip
from mmtoken.export import (
    OLDEST_TORCH,
    SUFFIXES,
    FeatureExtractor,
    check_exportable,
    compare,
    export,
    load,
)
from mmtoken.runtime.budget import set_budget

VIT = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
LATER = dict(VIT, mlp='swiglu', qk_norm=True, rotary='dinov3', num_registers=2)
SWIN = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2))
PSVIT = dict(stages=[(16, 1, (1,)), (32, 2, (2, 1))])
STATIC = {
    'STViTRSwin': lambda: STViTRSwin(SWIN, out_indices=(2, 3)),
    'STViTDeiT': lambda: STViTDeiT(VIT, base_layers=1),
    'STViTDeiT on a later trunk': lambda: STViTDeiT(
        dict(VIT, mlp='swiglu', qk_norm=True, rotary='dinov3', num_registers=2),
        base_layers=1,
        cls_token=True,
    ),
    'PSViT': lambda: PSViT(PSVIT, out_indices=(0, 1), window_sizes=(4, None)),
    'SWATSwin': lambda: SWATSwin(
        dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)), out_indices=(0, 3)
    ),
    'SWATDeiT': lambda: SWATDeiT(dict(VIT, patch_size=16, mlp_kernel=3), plane_size=4),
    'ViT': lambda: MergeViT(VIT, merge_blocks=()),
}
DGE = dict(embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
CHOOSING = {
    'MSViT': lambda: MSViT(VIT),
    'MSViT with a budget': lambda: set_budget(MSViT(VIT), 0.5),
    'DGEDeiT with a budget': lambda: set_budget(DGEDeiT(VIT), 0.5),
    'DGEDPVT': lambda: DGEDPVT(dict(DGE, mlp_ratios=(2, 2, 2, 2))),
    'MergeViT': lambda: MergeViT(VIT, merge_blocks=(1,)),
    'MergeViT on a later trunk': lambda: MergeViT(LATER, cls_token=True, merge_blocks=(0, 1)),
    'MSViT on a later trunk': lambda: MSViT(LATER),
}


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def extract_feat(self, images):
        return self.backbone(images)


def make(backbone):
    torch.manual_seed(0)
    return FeatureExtractor(Model(backbone())).eval()


needs_exporters = pytest.mark.skipif(
    torch.__version__ < OLDEST_TORCH, reason=f'export needs torch {OLDEST_TORCH}'
)


@needs_exporters
@pytest.mark.parametrize('form', SUFFIXES)
@pytest.mark.parametrize('name', STATIC)
def test_static_networks(name, form, tmp_path):
    """With any batch size, on a size that windows do not divide."""
    network = make(STATIC[name])
    file = tmp_path / f'network{SUFFIXES[form]}'
    export(network, torch.randn(2, 3, 64, 96), file, form, dynamic_batch=True)
    for batch in (2, 3):
        checks = compare(load(file, form), network, torch.randn(batch, 3, 64, 96))
        assert checks and all(check.shape[0] == batch for check in checks)


@needs_exporters
@pytest.mark.parametrize('form', SUFFIXES)
@pytest.mark.parametrize('name', CHOOSING)
def test_networks_that_choose(name, form, tmp_path):
    """The file chooses for each image."""
    network = make(CHOOSING[name])
    file = tmp_path / f'network{SUFFIXES[form]}'
    export(network, torch.randn(1, 3, 64, 96), file, form)
    exported = load(file, form)
    for scale in (0.1, 1, 10):
        compare(exported, network, scale * torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize('form', SUFFIXES)
def test_old_torch_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.5.1+cpu'))
    with pytest.raises(ValueError, match=r'needs torch 2\.6 or later, this is torch 2\.5\.1\+cpu'):
        export(nn.Identity(), torch.zeros(1), tmp_path / 'network', form)


def test_what_cannot_be_exported_is_refused():
    network = make(CHOOSING['MSViT'])
    check_exportable(network, single=True)
    with pytest.raises(ValueError, match='chooses its tokens image by image.* batch size of 1'):
        check_exportable(network, single=False)
    windows = make(lambda: MSViT(VIT, window_size=4, cls_token=False))
    with pytest.raises(ValueError, match='attention windows'):
        check_exportable(windows, single=True)


def test_wrong_outputs_are_refused():
    images = torch.ones(1, 3, 4, 4)
    assert compare(lambda x: (x,), lambda x: (x,), images)[0].error == 0
    with pytest.raises(ValueError, match="differ from PyTorch's by 5.0e-01"):
        compare(lambda x: (1.5 * x,), lambda x: (x,), images)
    with pytest.raises(ValueError, match=r'does not run on \(1, 3, 4, 4\)'):
        compare(lambda x: x[5], lambda x: (x,), images)
    with pytest.raises(ValueError, match='differ'):
        compare(lambda x: (x * float('nan'),), lambda x: (x,), images)
