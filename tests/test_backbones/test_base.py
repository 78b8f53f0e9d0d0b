import pytest
import torch
from helpers import wake
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmtoken.backbones.base import (
    PlainBackbone,
    check_out_indices,
    check_out_type,
    resolve_arch,
)
from mmtoken.layers.common.vit import ViTBlock

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


class DenseViT(PlainBackbone):
    """A method that reduces nothing."""

    def __init__(self, arch, **kwargs):
        super().__init__(arch, **kwargs)
        self.blocks = nn.ModuleList(
            ViTBlock(**self.block_args, drop_path=rate) for rate in self.drop_rates
        )
        self.finish_init()


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('size', [(64, 64), (50, 97)])
def test_the_trunk_is_a_vit(cls_token, size):
    ours = wake(DenseViT(ARCH, cls_token=cls_token, img_size=64, out_indices=(0, 2))).eval()
    theirs = VisionTransformer(
        64, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, class_token=cls_token, num_classes=0,
        global_pool='', dynamic_img_size=True, dynamic_img_pad=True,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        first, last = ours(images)
        expected = theirs.forward_intermediates(images, (0,), norm=False, intermediates_only=True)
        torch.testing.assert_close(first, expected[0], atol=1e-4, rtol=1e-4)
        tokens = theirs.forward_features(images)[:, int(cls_token) :]
        torch.testing.assert_close(last.flatten(2).mT, tokens, atol=1e-4, rtol=1e-4)


def test_vectors():
    images = torch.randn(2, 3, 40, 64)
    for out_type, expected in (
        ('avg_featmap', lambda tokens: tokens[:, 3:].mean(dim=1)),
        ('cls_token', lambda tokens: tokens[:, 0]),
    ):
        model = DenseViT(ARCH, cls_token=True, num_registers=2, out_type=out_type).eval()
        tokens, layout = model.reduce(images)
        assert tokens.shape == (2, 3 + 12, 32) and layout.grid == (3, 4)
        for block in model.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(model(images)[0], expected(model.norm(tokens)))


def test_blocks_behind_the_last_output_are_not_built():
    model = DenseViT(ARCH, out_indices=(0, 1), drop_path_rate=0.4)
    assert len(model.blocks) == 2 and isinstance(model.norm, nn.Identity)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0, pytest.approx(0.2)]


def test_resolve_arch():
    zoo = dict(tiny=dict(dims=1), small=dict(dims=2))
    assert resolve_arch('t', zoo, ['dims']) == dict(dims=1) == resolve_arch('tiny', zoo, ['dims'])
    assert resolve_arch(dict(dims=3), zoo, ['dims']) == dict(dims=3)
    with pytest.raises(ValueError, match=r"arch is 'huge'; known are \['small', 'tiny'\]"):
        resolve_arch('huge', zoo, ['dims'])
    with pytest.raises(ValueError, match=r"has the keys \['dims'\], got \['heads'\]"):
        resolve_arch(dict(heads=3), zoo, ['dims'])
    with pytest.raises(TypeError, match='a name or a dict, got int'):
        resolve_arch(3, zoo, ['dims'])


def test_out_indices():
    assert check_out_indices(-1, 4) == (3,) and check_out_indices([0, -1], 4) == (0, 3)
    for bad in ((), (1, 1), (2, 1), (4,), (-5,)):
        with pytest.raises(ValueError, match='rising indices from 0 to 3'):
            check_out_indices(bad, 4)


def test_out_type():
    check_out_type('map', ('map',), (0, 1), 3)
    with pytest.raises(ValueError, match=r"one of \('map',\), got 'tokens'"):
        check_out_type('tokens', ('map',), (3,), 3)
    with pytest.raises(ValueError, match='is of the last stage'):
        check_out_type('avg_featmap', ('avg_featmap',), (0, 3), 3)
    with pytest.raises(ValueError, match='needs cls_token=True'):
        check_out_type('cls_token', ('cls_token',), (3,), 3)
