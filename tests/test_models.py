import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmtoken
from mmtoken import backbones
from mmtoken.backbones.base import TokenBackbone
from mmtoken.registry import MODELS

LIBRARIES = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain')
ALONE = f"""
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {LIBRARIES}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)


sys.meta_path.insert(0, Blocked())
import torch
import mmtoken

for name in sys.argv[1:]:
    model = mmtoken.create_model(name)
    with mmtoken.token_losses() as published:
        maps = model(torch.randn(1, 3, 64, 96))
    (sum(m.square().mean() for m in maps) + published.total()).backward()
    assert all(p.grad is not None for p in model.parameters()), name
    print(name, model.feature_info.channels() == [m.shape[1] for m in maps])
"""


def smallest_of_each():
    """One name for each backbone."""
    names = {}
    for name in mmtoken.list_models('*_small') + mmtoken.list_models('*_tiny'):
        names[name.rpartition('_')[0]] = name
    return sorted(names.values())


def test_names():
    names = mmtoken.list_models()
    assert names == sorted(names)
    assert {'stvit_r_swin_tiny', 'dge_dpvt_small', 'stvit_deit_dinov3-small'} <= set(names)
    assert mmtoken.list_models('swat_deit_*') == [
        'swat_deit_base32', 'swat_deit_small', 'swat_deit_tiny'
    ]  # fmt: skip
    assert mmtoken.list_models('resnet*') == []
    zoos = [getattr(backbones, name).arch_zoo for name in backbones.__all__]
    assert len(names) == sum(map(len, zoos)) and len(smallest_of_each()) == len(zoos)


def test_every_registered_backbone_has_names():
    MODELS.import_from_location()
    registered = {
        cls for cls in MODELS.module_dict.values()
        if isinstance(cls, type) and issubclass(cls, TokenBackbone)
    }  # fmt: skip
    assert registered == {getattr(backbones, name) for name in backbones.__all__}


def test_without_the_libraries():
    """In an environment that imports none of them, but for the check of what is installed."""
    names = smallest_of_each()
    done = subprocess.run(
        [sys.executable, '-c', ALONE, *names], check=True, capture_output=True, text=True,
        env=dict(os.environ, MMTOKEN_SKIP_STACK_CHECK='1'),
    )  # fmt: skip
    assert done.stdout.splitlines() == [f'{name} True' for name in names]
    assert not done.stderr


def test_pooled_features():
    torch.manual_seed(0)
    vectors = mmtoken.create_model('swat_swin_tiny', features_only=False).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled, maps = vectors(image), vectors.backbone(image)
    assert pooled.shape == (2, vectors.num_features) == (2, 768)
    torch.testing.assert_close(pooled, nn.AdaptiveAvgPool2d(1)(maps[-1]).flatten(1))


def test_pretrained(tmp_path):
    """In timm's layout, strictly."""
    weights = {k: v + 1 for k, v in backbones.MergeViT('tiny').state_dict().items()}
    torch.save(weights, tmp_path / 'vit.pth')
    model = mmtoken.create_model('merge_vit_tiny', pretrained=tmp_path / 'vit.pth')
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match='vit.pth: does not fit PSViT'):
        mmtoken.create_model('psvit_tiny', pretrained=str(tmp_path / 'vit.pth'))
    with pytest.raises(FileNotFoundError):
        mmtoken.create_model('psvit_tiny', pretrained=tmp_path / 'none.pth')
    with pytest.raises(ValueError, match='names no checkpoint'):
        mmtoken.create_model('psvit_tiny', pretrained='')
    with pytest.raises(ValueError, match='a path or a URL'):
        mmtoken.create_model('psvit_tiny', pretrained=True)


def test_initialized(capfd):
    """As `init_weights` does, without its list of parameters."""
    model = mmtoken.create_model('msvit_tiny', out_indices=(0,))
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.training and 'Initialized by' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize(
    'name, close',
    [
        ('msvit_smal', 'did you mean msvit_small'),
        ('swat_deit', 'swat_deit_tiny'),
        ('resnet50', r"no model 'resnet50'; mmtoken.list_models\(\) has all names"),
        (None, 'no model None'),
    ],
)
def test_unknown_names(name, close):
    with pytest.raises(ValueError, match=close):
        mmtoken.create_model(name)


def test_bad_arguments():
    with pytest.raises(TypeError, match='MSViT takes no in_chans: it is in_channels'):
        mmtoken.create_model('msvit_tiny', in_chans=1)
    with pytest.raises(ValueError, match='rising indices'):
        mmtoken.create_model('psvit_tiny', out_indices=(3,))


def test_nothing_is_initialized_on_the_meta_device():
    with torch.device('meta'):
        model = mmtoken.create_model('stvit_r_swin_tiny')
    assert model.feature_info.channels() == [96, 192, 384, 768]
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    saved = model.state_dict(keep_vars=True).values()  # what loading gives values to: all there is
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in saved}
