import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmtoken.analysis import count_macs
from mmtoken.backbones import STViTDeiT
from mmtoken.layers.common.packed import unpack_equal

VIT = dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=48)
SMALL = dict(arch=VIT, base_layers=2, img_size=80)


def test_sixteen_tokens_at_224():
    model = STViTDeiT({**VIT, 'num_layers': 12}, out_type='tokens', out_indices=(3, 4, 11)).eval()
    with torch.no_grad():
        taps = model(torch.randn(2, 3, 224, 224))
    assert [tap.lengths.tolist() for tap in taps] == [[196] * 2, [196 + 16] * 2, [196 + 16] * 2]
    assert all(tap.grid == (14, 14) and len(tap.tokens) == tap.lengths.sum() for tap in taps)
    assert model.blocks[5].centers.shape == (1, 16, 32)


@pytest.mark.parametrize(
    'arch, gmacs, params',
    [('tiny', 0.52, 5_529_600), ('small', 1.91, 21_676_032), ('base', 7.26, 85_819_392)],
)
def test_cost(arch, gmacs, params):
    """The paper has 1.91 G for the small size (table 8); the other figures are our own."""
    model = STViTDeiT(arch, out_type='avg_featmap').eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.005)


def timm_model(**kwargs):
    return VisionTransformer(
        80, embed_dim=32, depth=6, num_heads=2, mlp_ratio=1.5, class_token=False, num_classes=0,
        global_pool='', dynamic_img_size=True, dynamic_img_pad=True, **kwargs,
    ).eval()  # fmt: skip


@pytest.mark.parametrize('size', [(80, 80), (64, 144), (97, 50)])
def test_twin_is_timms(size):
    theirs = timm_model()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    twin = STViTDeiT(**SMALL, semantic_size=None, out_indices=(1, 4, 5)).eval()
    twin.load_state_dict(theirs.state_dict(), strict=True)
    pooled = STViTDeiT(**SMALL, semantic_size=None, out_type='avg_featmap').eval()
    pooled.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = twin(image)
        expected = theirs.forward_intermediates(image, (1, 4), norm=False, intermediates_only=True)
        last = theirs.forward_features(image)
        for map_, other in zip(maps[:2], expected, strict=True):
            torch.testing.assert_close(map_, other, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(maps[2].flatten(2).mT, last, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled(image)[0], last.mean(1), atol=1e-4, rtol=1e-4)


def test_base_layers_are_those_of_the_twin():
    sparse = STViTDeiT(**SMALL, out_indices=(0, 1, 5)).eval()
    twin = STViTDeiT(**SMALL, semantic_size=None, out_indices=(0, 1, 5)).eval()
    shared = {n: t for n, t in sparse.state_dict().items() if n in twin.state_dict()}
    twin.load_state_dict(shared, strict=False)
    image = torch.randn(1, 3, 70, 110)
    with torch.no_grad():
        for ours, theirs in zip(sparse(image)[:2], twin(image)[:2], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_classification_averages_the_semantic_tokens():
    model = STViTDeiT(**SMALL, out_type='avg_featmap').eval()
    tokens = STViTDeiT(**SMALL, out_type='tokens').eval()
    tokens.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        (mean,) = model(image)
        semantic = unpack_equal(tokens(image)[0])[:, 25:]
        assert semantic.shape == (2, 4, 32)
        torch.testing.assert_close(mean, model.norm(semantic).mean(dim=1))


def test_prefix_tokens_stay_beside_the_semantic_tokens():
    """They are no part of the mean, and of the tokens for a neck; the class token is an output."""
    args = dict(SMALL, cls_token=True, num_registers=2, semantic_size=2)
    classes = STViTDeiT(**args, out_type='cls_token').eval()
    mean, tokens = (STViTDeiT(**args, out_type=t).eval() for t in ('avg_featmap', 'tokens'))
    for model in (mean, tokens):
        model.load_state_dict(classes.state_dict(), strict=False)
    image = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        inner, layout = classes.reduce(image)
        for i in range(6):
            inner, layout = classes.run_block(i, inner, layout)
        assert inner.shape == (2, 3 + 9, 32) and layout.image.shape == (2, 25, 32)
        torch.testing.assert_close(classes(image)[0], classes.norm(inner[:, 0]))
        torch.testing.assert_close(mean(image)[0], classes.norm(inner[:, 3:]).mean(dim=1))
        packed = unpack_equal(tokens(image)[0])
        torch.testing.assert_close(packed, torch.cat([layout.image, inner[:, 3:]], dim=1))


def test_each_tap_has_its_recovery_and_nothing_else():
    """Whatever no output needs would be without a gradient."""
    model = STViTDeiT(**SMALL, out_indices=(1, 3, 5))
    assert set(model.recover) == {'3', '5'}
    assert not list(model.norm.parameters())
    for kwargs in (
        dict(out_type='tokens'),
        dict(out_type='avg_featmap'),
        dict(semantic_size=None),
        dict(out_type='cls_token', cls_token=True, num_registers=2, base_layers=4),
        dict(cls_token=True, num_registers=2, base_layers=0, layer_scale=0.1),
    ):
        model = STViTDeiT(**SMALL | kwargs)
        (tap,) = model(torch.randn(2, 3, 80, 80))
        getattr(tap, 'tokens', tap).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['tiny', 'small', 'base'])
def test_names_are_timms(name):
    with torch.device('meta'):
        model = STViTDeiT(name, semantic_size=None, out_type='avg_featmap')
        dims = model.out_channels[0]
        theirs = VisionTransformer(
            embed_dim=dims, num_heads=dims // 64, class_token=False, num_classes=0, global_pool=''
        )
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


@pytest.mark.parametrize('channels', [47, 48, 100, 1000])
def test_feedforward_channels_are_met_exactly(channels):
    arch = dict(embed_dims=33, num_layers=4, num_heads=3, feedforward_channels=channels)
    with torch.device('meta'):
        model = STViTDeiT(arch, base_layers=1)
    assert {block.mlp.fc1.out_features for block in model.blocks} == {channels}


def test_drop_path_rises_to_its_rate():
    model = STViTDeiT(**SMALL, drop_path_rate=0.5)
    rates = [getattr(block, 'drop_path', None) or block.drop_path1 for block in model.blocks]
    rates = [getattr(rate, 'drop_prob', 0.0) for rate in rates]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_positions_learn_at_other_sizes():
    model = STViTDeiT(**SMALL)
    model(torch.randn(1, 3, 100, 150))[0].square().sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0
    assert model.blocks[3].centers.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(base_layers=5), 'from 0 to 4.*got 5'),
        (dict(semantic_size=0), 'got 0'),
        (dict(pooling='min'), "got 'min'"),
        (dict(refine_residual='both'), "got 'both'"),
        (dict(out_type='cls_token'), 'cls_token=True'),
        (dict(out_type='avg_featmap', out_indices=(1, 5)), r'last stage.*got \(1, 5\)'),
        (dict(arch={**VIT, 'num_heads': 5}), 'no multiple of num_heads=5'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        STViTDeiT(**{**SMALL, **bad})
