import pytest
import torch
from helpers import model_of, stir_routers
from mmengine.registry import MODELS

import mmtoken
from mmtoken.analysis import dense_twin
from mmtoken.necks import GrainUnpoolNeck

ONE = dict(in_channels=16, num_heads=2, out_channels=8)
SEVERAL = dict(in_channels=[8, 16], num_heads=[1, 2], sr_ratios=[2, 1], depth=1)


def maps(*shapes):
    return tuple(torch.randn(2, *shape) for shape in shapes)


def test_one_map_becomes_a_pyramid():
    neck = stir_routers(GrainUnpoolNeck(**ONE)).eval()
    outs = neck(maps((4, 9, 9), (16, 7, 10)))
    assert [tuple(o.shape[1:]) for o in outs] == [
        (8, 28, 40), (8, 14, 20), (8, 7, 10), (8, 4, 5), (8, 2, 3)
    ]  # fmt: skip


def test_several_maps_keep_their_shapes():
    neck = stir_routers(GrainUnpoolNeck(**SEVERAL)).eval()
    inputs = maps((8, 14, 11), (16, 7, 6))
    outs = neck(inputs)
    assert [o.shape for o in outs] == [x.shape for x in inputs]
    assert all(
        o.is_contiguous() and not torch.equal(o, x) for o, x in zip(outs, inputs, strict=True)
    )
    with pytest.raises(ValueError, match=r'\[8, 16\] are of 2 maps, got 1'):
        neck(inputs[:1])


def test_finest_everywhere_is_the_dense_twin():
    neck = GrainUnpoolNeck(**SEVERAL).eval()
    neck.init_weights()
    twin = GrainUnpoolNeck(**SEVERAL, granularities=(1,)).eval()
    missing, unexpected = twin.load_state_dict(neck.state_dict(), strict=False)
    assert not missing and all('.router.' in name for name in unexpected)
    inputs = maps((8, 14, 11), (16, 7, 6))
    for a, b in zip(neck(inputs), twin(inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert twin.budget is None
    twin.train()(inputs)  # needs nobody to collect losses


def test_budget_is_published():
    neck = stir_routers(GrainUnpoolNeck(**SEVERAL))
    inputs = maps((8, 14, 11), (16, 7, 6))
    with pytest.raises(RuntimeError, match='TokenLossHook'):
        neck(inputs)
    with mmtoken.token_losses() as published:
        outs = neck(inputs)
    assert set(published) == {
        'neck_loss_budget', 'neck_budget_ratio', 'neck_query_ratio_s0', 'neck_query_ratio_s1'
    }  # fmt: skip
    (published.total() + sum(o.square().mean() for o in outs)).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_routers_start_at_the_finest():
    neck = GrainUnpoolNeck(**ONE)
    neck.init_weights()
    for blocks in neck.stages:
        for block in blocks:
            assert block.router.gate.weight.std() < 0.02
            assert block.router.gate.bias.softmax(0)[0].item() == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(num_heads=3), 'in_channels: embed_dims=16 is no multiple of num_heads=3'),
        (dict(sr_ratios=[1, 2]), 'sr_ratios must be one number or 1'),
        (dict(depth=0), 'depth must be 1 or more, got 0'),
        (dict(granularities=(2, 4)), r'must rise from 1'),
        (dict(train_mode='fast'), "train_mode must be 'exact', 'dense' or 'sparse'"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        GrainUnpoolNeck(**{**ONE, **bad})


RESNET = dict(type='ResNet', depth=18, norm_eval=False, style='pytorch')
BOTH = [
    dict(
        type='mmtoken.GrainUnpoolNeck',
        in_channels=[64, 128, 256, 512],
        num_heads=[1, 2, 4, 8],
        sr_ratios=[8, 4, 2, 1],
        depth=1,
    ),
    dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=16, num_outs=4),
]


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_behind_a_backbone_of_the_libraries(library):
    cfg = model_of(library, RESNET, BOTH)
    twin = dense_twin(cfg)
    assert twin.neck[0].granularities == (1,) and twin.neck[0].budget is None
    network = MODELS.build(cfg)
    with mmtoken.token_losses() as published:
        features = network.extract_feat(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)
    ]  # fmt: skip
    assert 'neck_loss_budget' in published


def test_a_checkpoint_has_the_last_word(tmp_path):
    source = stir_routers(GrainUnpoolNeck(**ONE))
    torch.save(source.state_dict(), tmp_path / 'neck.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'neck.pth'))
    neck = GrainUnpoolNeck(**ONE, init_cfg=init_cfg)
    neck.init_weights()
    for name, value in neck.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
