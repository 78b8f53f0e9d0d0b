"""What every registered backbone promises."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, SWIN
from helpers import wake
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

import mmtoken
from mmtoken import backbones
from mmtoken.registry import MODELS

# Parameters that not every variant has
OPTIONAL = ('router', 'cls_token', 'reg_token', 'gate', 'patch_embed_coarse', 'patch_embed.')
CASES = [
    pytest.param(dict(type=f'mmtoken.{name}', drop_path_rate=0.0, **kwargs), id=f'{name}-{i}')
    for name, family in FAMILIES.items()
    for i, kwargs in enumerate(family.variants)
]


def family_of(cfg):
    return FAMILIES[cfg['type'].removeprefix('mmtoken.')]


def build(cfg, **kwargs):
    model = MMENGINE_MODELS.build({**cfg, **kwargs})
    wake(model)
    return model


def train(model, images):
    """Maps in training mode, and the losses that are born inside."""
    with mmtoken.token_losses() as published:
        maps = model.train()(images)
    return maps, published.total()


def test_every_backbone_is_covered():
    assert set(FAMILIES) == set(backbones.__all__)
    for name in FAMILIES:
        assert MODELS.get(f'mmtoken.{name}') is getattr(backbones, name)


@pytest.mark.parametrize('cfg', CASES)
def test_losses_of_its_own_need_the_hook(cfg):
    model, image = build(cfg).train(), torch.randn(1, 3, 64, 64)
    with mmtoken.token_losses() as published:
        model(image)
    has_losses = any(value.requires_grad for value in published.values())
    needs_hook = pytest.raises(RuntimeError, match='mmtoken.TokenLossHook')
    with needs_hook if has_losses else nullcontext():
        model(image)
    with torch.no_grad():
        model(image)
    model.eval()(image)


@pytest.mark.parametrize(
    'name, args',
    [
        *((name, getattr(backbones, name).twin_args) for name in FAMILIES),
        ('DGEDeiT', dict(budget=None)),
        ('MSViT', dict(gate=dict(loss=None))),
        ('MSViT', dict(frozen_stages=0)),  # the gate too
    ],
)
def test_nothing_without_losses_of_its_own_needs_the_hook(name, args):
    build(dict(FAMILIES[name].small, type=f'mmtoken.{name}', **args)).train()(
        torch.randn(1, 3, 64, 64)
    )


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('size', [(64, 64), (97, 131), (33, 250), (20, 20), (1, 1)])
def test_any_size(cfg, size):
    model = build(cfg).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    strides = family_of(cfg).strides
    assert isinstance(maps, tuple) and len(maps) == len(strides)
    for map_, channels, stride in zip(maps, model.out_channels, strides, strict=True):
        assert map_.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert map_.isfinite().all() and map_.is_contiguous()


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('which', [[0], [-1], [0, 2]], ids=str)
def test_feature_info(cfg, which):
    """Channels and strides of the maps that are returned, whichever they are."""
    family = family_of(cfg)
    indices = cfg.get('out_indices', range(family.num_stages))
    model = build(cfg, out_indices=[indices[i] for i in which]).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    info = model.feature_info
    assert info.channels() == [m.shape[1] for m in maps] == list(model.out_channels)
    assert info.reduction() == [96 // m.shape[3] for m in maps]
    assert all(model.get_submodule(name) is not None for name in info.module_name())


@pytest.mark.parametrize('cfg', CASES)
def test_images_of_a_batch_are_independent(cfg):
    model = build(cfg).eval()
    batch = torch.randn(3, 3, 100, 140)
    with torch.no_grad():
        together = model(batch)
        apart = [model(image[None]) for image in batch]
    for i, map_ in enumerate(together):
        torch.testing.assert_close(map_, torch.cat([a[i] for a in apart]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('cfg', CASES)
def test_gradients_reach_every_parameter(cfg):
    model = build(cfg)
    maps, inner = train(model, torch.randn(2, 3, 100, 140))
    (sum((m * torch.randn_like(m)).sum() for m in maps) + inner).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'no gradient for {name}'
        assert parameter.grad.isfinite().all(), f'bad gradient for {name}'
        # A key bias shifts all scores of a query alike: its exact gradient is zero.
        if not name.endswith(('kv.bias', 'qkv.bias')):
            assert parameter.grad.abs().sum() > 0, f'zero gradient for {name}'


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('frozen', ['nothing', 'stem', 'half', 'all'])
def test_frozen_stages_stay_frozen(cfg, frozen):
    family = family_of(cfg)
    stages = family.num_stages
    frozen_stages = dict(nothing=-1, stem=0, half=stages // 2, all=stages)[frozen]
    model = build(cfg, frozen_stages=frozen_stages)
    model.train()
    before = copy.deepcopy(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    maps, inner = train(model, torch.randn(2, 3, 64, 64))
    if parameters:
        (sum((m * torch.randn_like(m)).mean() for m in maps) + inner).backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

    names = family.stem if frozen_stages >= 0 else ()
    for i in range(frozen_stages):
        names += (family.stage.format(i),)
        if family.output is not None:
            names += (family.output.format(i),)
    assert not [k for k in changed if k.startswith(names)]
    assert bool(changed) == (frozen != 'all')
    assert any(k.startswith(family.stem[0]) for k in changed) == (frozen == 'nothing')
    running = [k for k in before if k.startswith(family.stem[0]) and k.endswith('running_mean')]
    assert all((k in changed) == (frozen == 'nothing') for k in running)


def test_norm_eval():
    """In the one backbone that has batch norms; all others take the argument too."""
    for norm_eval in (True, False):
        model = build(dict(type='mmtoken.STViTRSwin', arch=SWIN), norm_eval=norm_eval).train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 2 and all(norm.training != norm_eval for norm in norms)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('cfg', CASES)
def test_norm_eval_is_taken(cfg):
    model = build(cfg, norm_eval=True).train()
    assert all(m.training for m in model.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize('cfg', CASES)
def test_checkpointing_changes_nothing(cfg):
    plain, recomputed = build(cfg, norm_eval=True), build(cfg, norm_eval=True, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 80, 100)
    for model in (plain, recomputed):
        torch.manual_seed(1)
        maps, inner = train(model, image)
        (sum(m.square().mean() for m in maps) + inner).backward()
    grads = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, msg=name)


@pytest.mark.parametrize('cfg', CASES)
def test_out_indices(cfg):
    model, image = build(cfg).eval(), torch.randn(1, 3, 70, 90)
    some = build(cfg, out_indices=model.out_indices[1:3]).eval()
    some.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(some(image), model(image)[1:3])


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('prefix', [None, 'backbone', 'backbone.'])
def test_pretrained_init(cfg, prefix, tmp_path):
    source = build(cfg)
    start = '' if prefix is None else 'backbone.'
    state = {start + k: v for k, v in source.state_dict().items()}
    if prefix:
        state['neck.conv.weight'] = torch.zeros(1)
    torch.save(dict(state_dict=state), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    if prefix:
        init_cfg['prefix'] = prefix
    model = build(cfg, init_cfg=init_cfg)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize('cfg', CASES)
def test_copies_and_pickles(cfg):
    model, image = build(cfg).eval(), torch.randn(1, 3, 60, 60)
    with torch.no_grad():
        expected = model(image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(image), expected, atol=0, rtol=0)
        fresh = build(cfg).eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(fresh(image), expected, atol=0, rtol=0)


@pytest.mark.parametrize('cfg', CASES)
def test_training_after_inference_mode(cfg):
    """Masks are cached: those made in inference mode must serve autograd too."""
    model, image = build(cfg), torch.randn(1, 3, 72, 104)
    with torch.inference_mode():
        model.eval()(image)
    maps, inner = train(model, torch.cat([image, image]))
    (sum(m.sum() for m in maps) + inner).backward()


@pytest.mark.parametrize('cfg', CASES)
def test_bfloat16_autocast(cfg):
    model, image = build(cfg).eval(), torch.randn(1, 3, 72, 104)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        maps = model(image)
    with torch.no_grad():
        for half, full in zip(maps, model(image), strict=True):
            assert (half.float() - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize('cfg', CASES)
def test_layer_depth(cfg):
    model = build(cfg)
    depths = {}
    for name, _ in model.named_parameters():
        depth, num_layers = model.get_layer_depth(f'backbone.{name}', prefix='backbone.')
        depths[name] = depth
    family = family_of(cfg)
    if family.output is not None or 'norm.weight' in depths:
        assert num_layers - 1 in depths.values()
    assert set(depths.values()) | {num_layers - 1} == set(range(num_layers))
    for name, depth in family.depths.items():
        if name not in depths and any(part in name for part in OPTIONAL):
            continue
        assert depths[name] == depth % num_layers, name
    assert model.get_layer_depth('decode_head.conv.weight', 'backbone.')[0] == num_layers - 1


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize(
    'bad, error, message',
    [
        (dict(arch='huge'), ValueError, "'huge'; known are"),
        (dict(arch=7), TypeError, 'a name or a dict, got int'),
        (dict(arch=dict(depth=3)), ValueError, r"got \['depth'\]"),
        (dict(out_indices=(99,)), ValueError, r'from 0 to {last}, got \(99,\)'),
        (dict(out_indices=(2, 1)), ValueError, 'rising'),
        (dict(out_indices=()), ValueError, 'rising'),
        (dict(frozen_stages=99), ValueError, 'from -1 to {stages}, got 99'),
    ],
)
def test_bad_arguments(cfg, bad, error, message):
    stages = family_of(cfg).num_stages
    message = message.replace('{stages}', str(stages)).replace('{last}', str(stages - 1))
    with pytest.raises(error, match=message):
        build(cfg, **bad)
