from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import force_granularity, stir_routers
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mmtoken
from mmtoken.backbones import DGEDeiT
from mmtoken.layers.common.regions import make_region_layout
from mmtoken.losses.budget import block_complexity, constant_complexity, count_tokens
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.routing_override import routing_override

DATA = Path(__file__).parent.parent / 'data'
VIT = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=48)
LEGACY = dict(type='mmtoken.BudgetLoss', legacy=True, num_classes=1000)


def make(**kwargs):
    return DGEDeiT(**{'arch': VIT, 'img_size': 80, **kwargs})


@pytest.mark.parametrize('cls_token', [False, True])
@pytest.mark.parametrize('size', [(80, 80), (64, 144), (97, 50)])
def test_twin_is_timms(cls_token, size):
    theirs = VisionTransformer(
        80, embed_dim=32, depth=4, num_heads=2, mlp_ratio=1.5, class_token=cls_token, num_classes=0,
        global_pool='', dynamic_img_size=True, dynamic_img_pad=True,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    twin = make(**DGEDeiT.twin_args, cls_token=cls_token, out_indices=(0, 2, 3)).eval()
    assert twin.budget is None
    assert twin.state_dict().keys() == theirs.state_dict().keys()
    twin.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(2, 3, *size)
    outs = {}
    for out_type in ('avg_featmap', 'cls_token')[: 1 + cls_token]:
        model = make(**DGEDeiT.twin_args, cls_token=cls_token, out_type=out_type).eval()
        model.load_state_dict(twin.state_dict())
        with torch.no_grad():
            (outs[out_type],) = model(image)
    with torch.no_grad():
        maps = twin(image)
        expected = theirs.forward_intermediates(image, (0, 2), norm=False, intermediates_only=True)
        last = theirs.forward_features(image)
    for map_, other in zip(maps, expected, strict=False):
        torch.testing.assert_close(map_, other, atol=1e-4, rtol=1e-4)
    tokens = last[:, int(cls_token) :]
    torch.testing.assert_close(maps[2].flatten(2).mT, tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outs.pop('avg_featmap'), tokens.mean(1), atol=1e-4, rtol=1e-4)
    for out in outs.values():
        torch.testing.assert_close(out, last[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('cls_token', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(128, 128), (100, 150)])
def test_finest_everywhere_is_the_twin(cls_token, training, size):
    kwargs = dict(cls_token=cls_token, out_indices=(1, 3))
    model = force_granularity(stir_routers(make(**kwargs)), 0).train(training)
    twin = make(**DGEDeiT.twin_args, **kwargs).train(training)
    state = {k: v for k, v in model.state_dict().items() if 'router' not in k}
    twin.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, *size)
    with mmtoken.token_losses() as published:
        maps = model(image)
    assert training == bool(published)
    for map_, expected in zip(maps, twin(image), strict=True):
        torch.testing.assert_close(map_, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('cls_token', [False, True])
def test_inference_and_training_are_the_same_function(cls_token):
    model, outs = stir_routers(make(cls_token=cls_token)), []
    image = torch.randn(2, 3, 100, 150)
    for train_mode in ('exact', 'dense', 'sparse', None):
        model.train(train_mode is not None)
        for block in model.blocks:
            block.train_mode = train_mode or 'exact'
        with (
            torch.set_grad_enabled(model.training),
            mmtoken.token_losses(),
            routing_override(query_ratio=0.5),
        ):
            outs.append(model(image)[0])
    for map_ in outs[:3]:
        torch.testing.assert_close(map_, outs[3], atol=1e-5, rtol=1e-5)


def test_released_budget():
    """Of DeiT-S at 256 pixels, with every region at one granularity."""
    golden = np.load(DATA / 'dge_budget_full_models.npz')
    with torch.device('meta'):
        model = DGEDeiT('small', cls_token=True, img_size=256, budget=LEGACY)
    layout = make_region_layout((16, 16), (1, 2, 4), 4, num_prefix_tokens=1)
    for level, side in enumerate((1, 2, 4)):
        gates = nn.functional.one_hot(torch.full((1, 4, 4), level), 3)
        static, dynamic = costs(model, (256, 256), gates, layout)
        assert static == golden['deit_small_256.static']
        assert dynamic == golden[f'deit_small_256.dynamic_all_{side}']


def costs(model, size, gates, layout):
    """Of an image in the full network, and with the same gates in all blocks."""
    size = torch.tensor([size], dtype=torch.float64)
    constant = constant_complexity(model.budget, [model.patch_widths], size)
    tokens, queries = count_tokens(gates, layout, None)
    return [
        (constant + len(model.blocks) * block_complexity(model.block_widths, tokens, n)).item()
        for n in (tokens, queries)
    ]


def test_budget_of_a_forward_pass_is_that_of_its_blocks():
    model = force_granularity(make(budget=LEGACY, cls_token=True), 1).train()
    asked = []
    model.budget.register_forward_hook(lambda module, args, out: asked.append(args))
    with mmtoken.token_losses() as published:
        model(torch.randn(2, 3, 128, 64))
    ((static, dynamic),) = asked
    layout = make_region_layout((8, 4), (1, 2, 4), 4, num_prefix_tokens=1)
    gates = nn.functional.one_hot(torch.ones(1, 2, 1, dtype=torch.long), 3)
    expected = costs(model, (128, 64), gates, layout)
    assert [static.tolist(), dynamic.tolist()] == [[cost] * 2 for cost in expected]
    assert list(published) == ['loss_budget', 'budget_ratio', 'query_ratio_s0']
    assert published['query_ratio_s0'].item() == pytest.approx(9 / 33)


def test_twin_and_routed_network_take_each_others_weights():
    routed, twin = stir_routers(make()), make(**DGEDeiT.twin_args)
    state = {k: v for k, v in routed.state_dict().items() if 'router' not in k}
    twin.load_state_dict(state, strict=True)
    other = make()
    other.load_state_dict(twin.state_dict(), strict=False)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name], value), name


def test_parameters():
    with torch.device('meta'):
        model = DGEDeiT('small', cls_token=True, img_size=256)
        theirs = VisionTransformer(256, embed_dim=384, num_heads=6, num_classes=0)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routers = sum(size for name, size in sizes.items() if '.router.' in name)
    assert routers == 13_860
    assert sum(sizes.values()) - routers == sum(p.numel() for p in theirs.parameters())


def test_padding_is_not_counted():
    model = force_granularity(make(cls_token=True), 1).train()
    image, shares = torch.zeros(2, 3, 192, 256), []
    image[:, :, :100, :64] = torch.randn(2, 3, 100, 64)
    for height, width in ((128, 64), (192, 64), (192, 256)):
        with mmtoken.token_losses() as published, record_routing() as record:
            model(image[:, :, :height, :width])
        shares.append({name: value.item() for name, value in published.items()})
        for decision in record:
            assert torch.equal(decision.choice, torch.where(decision.padding, 2, 1))
            assert (~decision.padding).sum(dim=(1, 2)).tolist() == [2, 2]
    assert shares[0] == shares[1] == shares[2]


@pytest.mark.parametrize('with_cp', [False, True])
def test_routers_learn_from_both_losses(with_cp, published_names):
    model = stir_routers(make(with_cp=with_cp, drop_path_rate=0.0)).train()
    with mmtoken.token_losses() as published:
        (map_,) = model(torch.randn(2, 3, 128, 128))
        for loss in ((map_ * torch.randn_like(map_)).mean(), published.total()):
            model.zero_grad()
            loss.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                assert 'router' not in name or parameter.grad.any(), name
    assert sorted(published_names) == ['budget_ratio', 'loss_budget', 'query_ratio_s0']


@pytest.mark.parametrize('source', [None, 'config', 'checkpoint', 'twin'])
def test_new_routers_survive_initialization(source, tmp_path):
    init_cfg = dict(type='TruncNormal', layer='Linear', std=0.5) if source == 'config' else None
    if source in ('checkpoint', 'twin'):
        other = make() if source == 'checkpoint' else make(**DGEDeiT.twin_args)
        for parameter in other.parameters():
            nn.init.ones_(parameter)
        torch.save(other.state_dict(), tmp_path / 'weights.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model = make(init_cfg=init_cfg)
    model.init_weights()
    for block in model.blocks:
        if source == 'checkpoint':
            assert block.router.gate.bias.tolist() == [1, 1, 1]
        else:
            bias = block.router.gate.bias.tolist()
            assert bias == pytest.approx([1.8188, -1.8188, -1.8188], abs=1e-4)
            assert 0 < block.router.gate.weight.std() < 0.015
        if source in ('checkpoint', 'twin'):
            assert (block.mlp.fc1.weight == 1).all()


def test_granularities():
    model = stir_routers(make(granularities=[1, 2], region_size=2)).train()
    with mmtoken.token_losses(), record_routing() as record:
        model(torch.randn(2, 3, 100, 100))
    assert [decision.choice.shape for decision in record] == [(2, 4, 4)] * 4
    assert {0, 1} == set(torch.cat([d.choice for d in record]).flatten().tolist())


def test_drop_path_rises_to_its_rate():
    rates = [block.drop_path.drop_prob for block in make(drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_norm_only_where_it_is_used():
    assert not list(make(out_indices=(0, 2)).norm.parameters())
    model = stir_routers(make(out_indices=(1, 3), cls_token=True)).train()
    with mmtoken.token_losses() as published:
        maps = model(torch.randn(2, 3, 80, 80))
    (sum(m.square().sum() for m in maps) + published.total()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(granularities=(2, 4)), r'got \(2, 4\)'),
        (dict(granularities=(1, 3)), 'region_size=4'),
        (dict(train_mode='fast'), "got 'fast'"),
        (dict(out_type='tokens'), "got 'tokens'"),
        (dict(out_type='cls_token'), 'needs cls_token=True'),
        (dict(out_type='avg_featmap', out_indices=(1, 3)), r'out_indices=\(3,\); got \(1, 3\)'),
        (dict(arch={**VIT, 'num_heads': 5}), 'no multiple of num_heads=5'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        make(**bad)
