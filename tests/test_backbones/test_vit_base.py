import pytest
import torch
from helpers import wake
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmtoken.backbones.vit_base import PlainBackbone
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
