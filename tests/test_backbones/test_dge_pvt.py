import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import force_granularity, stir_routers
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmtoken
from mmtoken.backbones import DGEDPVT, DGEPVT
from mmtoken.layers.common import routing
from mmtoken.layers.common.padding import padding_regions
from mmtoken.layers.common.regions import make_region_layout
from mmtoken.layers.dge.block import DynamicGranularityBlock, GranularityRouter
from mmtoken.losses import BudgetLoss
from mmtoken.losses.budget import block_complexity, constant_complexity, count_tokens
from mmtoken.runtime.decisions import record_routing
from mmtoken.runtime.routing_override import routing_override

DATA = Path(__file__).parent.parent / 'data'
PYRAMID = dict(
    embed_dims=(16, 32, 40, 64),
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(4, 4, 2, 2),
)
TINY = dict(PYRAMID, sr_ratios=(8, 4, 2, 1))
LEGACY = dict(type='mmtoken.BudgetLoss', legacy=True, num_classes=1000)
KINDS = [(DGEPVT, TINY), (DGEDPVT, PYRAMID)]


def make(cls=DGEPVT, arch=TINY, **kwargs):
    return cls(arch, **{'pretrain_img_size': 128, 'drop_path_rate': 0.0, **kwargs})


def spy(model):
    """What the budget is asked about."""
    asked = []
    model.budget.register_forward_hook(lambda module, args, out: asked.append(args))
    return asked


@pytest.fixture(scope='module')
def golden():
    return dict(np.load(DATA / 'dge_tiny_pvt_dge_cls.npz'))


def released_state(golden):
    state = {}
    for name, value in golden.items():
        if name.startswith('sd.') and not name.endswith('splits'):
            name = re.sub(r'^(\w+_embed)(\d)', lambda m: f'layers.{int(m[2]) - 1}.{m[1]}', name[3:])
            name = re.sub(r'^block(\d)', lambda m: f'layers.{int(m[1]) - 1}.blocks', name)
            name = name.replace('dge.router', 'router')
            name = re.sub(r'^cls_token', 'layers.3.cls_token', name)
            state[name] = torch.from_numpy(value)
    return state


def test_released_classifier(golden, monkeypatch):
    """In eval mode, and its complexity in training with nothing left to chance."""
    state = released_state(golden)
    head = {name[5:]: state.pop(name) for name in list(state) if name.startswith('head.')}
    budget = dict(LEGACY, num_classes=10)
    model = make(cls_token=True, out_type='cls_token', out_indices=(3,), budget=budget)
    model.load_state_dict(state, strict=True)
    x = torch.from_numpy(golden['x']).float()
    monkeypatch.setattr(routing, 'gumbel_noise', torch.zeros_like)
    asked, logits = spy(model), torch.from_numpy(golden['logits'])
    for training, context in ((False, torch.no_grad()), (True, mmtoken.token_losses())):
        with context, record_routing() as record:
            (out,) = model.train(training)(x)
        out = nn.functional.linear(out, head['weight'], head['bias'])
        torch.testing.assert_close(out, logits, atol=2e-5, rtol=0)
        gates = {k: v for k, v in golden.items() if k.startswith('gate_index.')}
        assert len(gates) == len(record) == 5
        for decision, expected in zip(record, gates.values(), strict=True):
            assert decision.choice.tolist() == expected.tolist()
    ((static, dynamic),) = asked
    assert static.mean().item() == golden['comp_static']
    assert dynamic.mean().item() == pytest.approx(golden['comp_dynamic'].item(), rel=1e-12)


@pytest.mark.parametrize('arch', ['small', 'tiny'])
def test_released_budget(arch):
    """Of whole models at 256 pixels, with every region at one granularity."""
    golden = np.load(DATA / 'dge_budget_full_models.npz')
    with torch.device('meta'):
        model = DGEPVT(arch, cls_token=True, pretrain_img_size=256, budget=LEGACY)
    size = torch.tensor([[256.0, 256.0]], dtype=torch.float64)
    for level, side in enumerate((1, 2, 4)):
        static = dynamic = constant_complexity(model.budget, model.patch_widths, size)
        for stage, widths in zip(model.layers, model.block_widths, strict=True):
            grid, prefix = (256 // stage.stride,) * 2, int(stage.cls_token is not None)
            layout = stage.blocks[0].layout(grid, prefix, 'cpu')
            gates = nn.functional.one_hot(torch.full((1, *layout.shape), level), 3)
            tokens, queries = count_tokens(gates, layout, None)
            static = static + len(stage.blocks) * block_complexity(widths, tokens, tokens)
            dynamic = dynamic + len(stage.blocks) * block_complexity(widths, tokens, queries)
        assert static.item() == golden[f'pvt_{arch}_256.static']
        assert dynamic.item() == golden[f'pvt_{arch}_256.dynamic_all_{side}']


@pytest.mark.parametrize(
    'arch, millions, routers',
    [
        ('tiny', 13.354, 6_168),
        ('small', 24.617, 12_528),
        ('medium', 44.351, 24_084),
        ('large', 61.523, 34_299),
    ],
)
def test_parameters(arch, millions, routers):
    with torch.device('meta'):
        model = DGEPVT(
            arch, cls_token=True, out_type='cls_token', out_indices=(3,), pretrain_img_size=256
        )
        head = nn.Linear(512, 1000)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values()) + sum(p.numel() for p in head.parameters())
    assert round(total / 1e6, 3) == millions
    assert sum(size for name, size in sizes.items() if '.router.' in name) == routers


@pytest.mark.parametrize('cls, arch', KINDS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(128, 128), (100, 150)])
def test_finest_everywhere_is_the_twin(cls, arch, training, size):
    model = force_granularity(stir_routers(make(cls, arch)), 0).train(training)
    twin = make(cls, arch, **cls.twin_args).train(training)
    assert twin.budget is None
    state = {k: v for k, v in model.state_dict().items() if 'router' not in k}
    twin.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, *size)
    with mmtoken.token_losses() as published:
        maps = model(image)
    assert training == bool(published)
    if training:
        assert published['budget_ratio'] == 1
    for map_, expected in zip(maps, twin(image), strict=True):
        torch.testing.assert_close(map_, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'granularities, size', [((1, 2), 4), ((1, 2), 2), ((1, 3), 3), ([1, 4], 8)]
)
def test_other_granularities(granularities, size):
    model = stir_routers(make(granularities=granularities, region_size=size)).train()
    image = torch.randn(2, 3, 130, 160)
    with mmtoken.token_losses() as published, record_routing() as record:
        loss = sum(map_.square().mean() for map_ in model(image))
    (loss + published.total()).backward()
    assert len(record) == 5
    assert all(decision.granularities == tuple(granularities) for decision in record)
    assert {0, 1} == set(torch.cat([d.choice.flatten() for d in record]).tolist())
    gates = [p for name, p in model.named_parameters() if 'router' in name]
    assert len(gates) == 10
    assert all(len(p) == 2 and p.grad.any() for p in gates)


def test_inference_and_training_are_the_same_function():
    """For a given routing; and on borders that regions stick out of."""
    for cls, arch in KINDS:
        model, image = stir_routers(make(cls, arch)), torch.randn(2, 3, 100, 150)
        outs = []
        for train_mode in ('exact', 'dense', 'sparse', None):
            model.train(train_mode is not None)
            for block in model.modules():
                if isinstance(block, DynamicGranularityBlock) and train_mode:
                    block.train_mode = train_mode
            quiet = nullcontext() if train_mode else torch.no_grad()
            with quiet, mmtoken.token_losses(), routing_override(query_ratio=0.5):
                outs.append(model(image))
        for maps in outs[:3]:
            for map_, expected in zip(maps, outs[3], strict=True):
                torch.testing.assert_close(map_, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('size', [(128, 128), (90, 128)])
def test_padding_is_not_counted(size):
    """More of it, whole regions in every stage, does not change what the budget compares."""
    for level in (1, 2):
        model = force_granularity(make(cls_token=True), level)
        asked, shares = spy(model), []
        image = torch.zeros(2, 3, 256, 384)
        image[:, :, : size[0], : size[1]] = torch.randn(2, 3, *size)
        for height, width in ((128, 128), (256, 128), (256, 384)):
            with mmtoken.token_losses() as published, record_routing() as record:
                model(image[:, :, :height, :width])
            shares.append({name: value.item() for name, value in published.items()})
            for decision in record:
                assert torch.equal(decision.choice, torch.where(decision.padding, 2, level))
                layout = make_region_layout(decision.grid, (1, 2, 4), 4)
                stride = height // decision.grid[0]
                expected = padding_regions(torch.tensor([size] * 2), stride, layout)
                assert torch.equal(decision.padding, expected)
        assert shares[0] == shares[1] == shares[2]
        for static, dynamic in asked:
            assert torch.equal(static, asked[0][0]) and torch.equal(dynamic, asked[0][1])
        assert shares[0]['budget_ratio'] < 1


def test_images_count_each_for_itself():
    model = force_granularity(make(cls_token=True), 1)
    asked, images = spy(model), torch.zeros(3, 3, 256, 256)
    for image, (height, width) in zip(images, ((256, 256), (70, 250), (128, 128)), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    with mmtoken.token_losses():
        model(images)
        for image in images:
            model(image[None])
    together, *alone = asked
    for counts, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(counts, torch.cat(parts))
        assert counts[0] > counts[1] > counts[2]


def test_what_is_published():
    model = stir_routers(make(cls_token=True)).train()
    image = torch.randn(3, 3, 128, 160)
    with mmtoken.token_losses() as published, record_routing() as record:
        model(image)
    ratios = [f'query_ratio_s{i}' for i in range(4)]
    assert list(published) == ['loss_budget', 'budget_ratio', *ratios]
    ratio = published['budget_ratio'].item()
    assert published['loss_budget'].item() == pytest.approx((ratio - 0.5) ** 2, abs=1e-6)
    first = record[0].choice
    queries = sum((first == k).sum().item() * n for k, n in enumerate((16, 4, 1)))
    assert published['query_ratio_s0'].item() == pytest.approx(queries / (3 * 32 * 40))
    assert not published['query_ratio_s0'].requires_grad


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('outside', [False, True])
def test_published_once(with_cp, outside, published_names):
    """Also when backward makes everything again while somebody collects."""
    model = stir_routers(make(with_cp=with_cp)).train()
    image = torch.randn(2, 3, 128, 128, requires_grad=True)
    with mmtoken.token_losses(), record_routing() as record:
        maps = checkpoint(model, image, use_reentrant=False) if outside else model(image)
        assert published_names.count('loss_budget') == 1
        assert len(published_names) == 6 and len(record) == 5
        sum(m.square().mean() for m in maps).backward(retain_graph=not outside)
    assert len(published_names) == 6 and len(record) == 5 * (1 + outside)
    if outside:
        assert all(
            torch.equal(a.choice, b.choice) for a, b in zip(record, record[5:], strict=False)
        )


def test_budget_alone_teaches_routers():
    model = stir_routers(make()).train()
    with mmtoken.token_losses() as published:
        model(torch.randn(2, 3, 128, 128))
    published.total().backward()
    gates = [p for name, p in model.named_parameters() if 'router' in name]
    assert len(gates) == 10 and all(p.grad.any() for p in gates)
    for name, parameter in model.layers[3].blocks[-1].named_parameters():
        assert 'router' in name or parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize('train_mode', ['exact', 'dense', 'sparse'])
def test_task_alone_teaches_routers(train_mode):
    model = stir_routers(make(budget=None, train_mode=train_mode)).train()
    maps = model(torch.randn(2, 3, 128, 128))  # nobody needs to collect
    sum((m * torch.randn_like(m)).mean() for m in maps).backward()
    gates = [p for name, p in model.named_parameters() if 'router' in name]
    assert len(gates) == 10 and all(p.grad.any() for p in gates)


def test_budget_is_built_from_its_config():
    budget = dict(type='mmtoken.BudgetLoss', target=0.25, loss_weight=3.0)
    assert isinstance(make().budget, BudgetLoss) and make().budget.target == 0.5
    model = force_granularity(make(budget=budget), 0).train()
    with mmtoken.token_losses() as published:
        model(torch.randn(1, 3, 64, 64))
    assert published['loss_budget'].item() == pytest.approx(3 * 0.75**2)


def assert_new_routers(model):
    gates = [m.gate for m in model.modules() if isinstance(m, GranularityRouter)]
    assert len(gates) == 5
    for gate in gates:
        assert gate.bias.tolist() == pytest.approx([1.8188, -1.8188, -1.8188], abs=1e-4)
        assert 0 < gate.weight.std() < 0.015


@pytest.mark.parametrize('init_cfg', [None, dict(type='TruncNormal', layer='Linear', std=0.5)])
@pytest.mark.parametrize('cls, arch', KINDS)
def test_new_routers_survive_initialization(cls, arch, init_cfg):
    model = make(cls, arch, init_cfg=init_cfg)
    assert_new_routers(model)
    model.init_weights()
    assert_new_routers(model)
    std = model.layers[3].blocks[0].mlp.fc1.weight.std().item()
    assert std == pytest.approx(0.02 if init_cfg is None else 0.5, rel=0.3)


@pytest.mark.parametrize('routed', [False, True])
def test_routers_of_a_checkpoint(routed, tmp_path):
    source = stir_routers(make()) if routed else stir_routers(make(**DGEPVT.twin_args))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model = make(init_cfg=init_cfg)
    model.init_weights()
    state = model.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(state[name], value), name
    if not routed:
        assert_new_routers(model)


def test_vectors():
    image = torch.randn(2, 3, 96, 130)
    kwargs = dict(cls_token=True, out_indices=(3,))
    maps = stir_routers(make(**kwargs)).eval()
    outs = {}
    for out_type in ('cls_token', 'avg_featmap'):
        model = make(**kwargs, out_type=out_type).eval()
        missing = model.load_state_dict(maps.state_dict(), strict=False).missing_keys
        assert missing == ['norm.weight', 'norm.bias']
        with torch.no_grad():
            (outs[out_type],) = model(image)
    with torch.no_grad():
        (map_,) = maps(image)
    assert not list(maps.norm.parameters()) and model.norm.eps == 1e-6
    expected = model.norm(map_.permute(0, 2, 3, 1)).mean(dim=(1, 2))
    torch.testing.assert_close(outs['avg_featmap'], expected)
    assert outs['cls_token'].shape == (2, 64)
    assert outs['cls_token'].mean(dim=1).abs().max() < 1e-5  # normalised
    assert not torch.allclose(outs['cls_token'], outs['avg_featmap'], atol=1e-2)


def test_every_parameter_of_a_classifier_learns():
    for kwargs in (dict(out_type='cls_token', cls_token=True), dict(out_type='avg_featmap')):
        model = stir_routers(make(**kwargs, out_indices=(3,))).train()
        with mmtoken.token_losses() as published:
            (out,) = model(torch.randn(2, 3, 128, 128))
        ((out * torch.randn_like(out)).sum() + published.total()).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_overridden_layouts():
    model, image = make().eval(), torch.randn(2, 3, 256, 256)
    layouts = []
    for seed in (0, 0, 1):
        override = routing_override(query_ratio=0.4, seed=seed)
        with torch.no_grad(), record_routing() as record, override:
            model(image)
        layouts.append([decision.choice for decision in record])
        for decision in record[:4]:
            counts = torch.tensor([16, 4, 1])[decision.choice].sum((1, 2))
            assert ((counts / (decision.grid[0] * decision.grid[1]) - 0.4).abs() < 0.012).all()
            assert not torch.equal(*decision.choice)
        assert not torch.equal(record[1].choice, record[2].choice)
    first, again, other = layouts
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first[:3], other))


def test_drop_path_rises_to_its_rate():
    model = make(drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_arguments_reach_the_blocks():
    model = make(in_channels=1, qkv_bias=False)
    assert model.layers[2].blocks[0].attn.kv.bias is None
    with torch.no_grad():
        assert len(model.eval()(torch.randn(1, 1, 40, 40))) == 4


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(granularities=(2, 4)), r'got \(2, 4\)'),
        (dict(granularities=(1, 3)), 'region_size=4'),
        (dict(granularities=()), r'got \(\)'),
        (dict(train_mode='fast'), "got 'fast'"),
        (dict(out_type='tokens'), "got 'tokens'"),
        (dict(out_type='cls_token', out_indices=(3,)), 'needs cls_token=True'),
        (dict(out_type='avg_featmap'), r'out_indices=\(3,\); got \(0, 1, 2, 3\)'),
        (dict(arch=dict(TINY, depths=(1, 1))), 'one value per stage'),
        (dict(arch={k: (*v, 8) for k, v in TINY.items()}), 'of 1 to 4 stages'),
        (dict(arch=dict(TINY, num_heads=(1, 3, 5, 8))), 'embed_dims=32 is no multiple'),
        (dict(arch=dict(TINY, sr_ratios=(8, 4, 2, 2)), cls_token=True), 'sr_ratio 1.*got 2'),
        (dict(budget=dict(type='mmtoken.BudgetLoss', target=0)), 'target'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        make(**bad)


def test_registered():
    cfg = dict(type='mmtoken.DGEPVT', arch=TINY, budget=None)
    assert isinstance(MMENGINE_MODELS.build(cfg), DGEPVT)
