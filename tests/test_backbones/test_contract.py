"""What every registered backbone promises."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmtoken import backbones
from mmtoken.registry import MODELS

SWIN = dict(embed_dims=16, depths=(2, 1, 6, 1), num_heads=(1, 2, 2, 4))
VARIANTS = {
    'STViTRSwin': [
        dict(arch=SWIN),
        dict(arch=SWIN, pad_mask='exact'),
        dict(arch=SWIN, pad_mask=None, conv_pos=True),
        dict(arch=SWIN, semantic_size=None),
    ],
}
CASES = [
    pytest.param(dict(type=f'mmtoken.{name}', drop_path_rate=0.0, **kwargs), id=f'{name}-{i}')
    for name, variants in VARIANTS.items()
    for i, kwargs in enumerate(variants)
]


def build(cfg, **kwargs):
    model = MMENGINE_MODELS.build({**cfg, **kwargs})
    wake(model)
    return model


def wake(model):
    """Give every parameter a say: LayerScale starts at 1e-5, norms at the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.empty_like(parameter).uniform_(0.2, 0.6, generator=generator))


def test_every_backbone_is_covered():
    assert set(VARIANTS) == set(backbones.__all__)
    for name in VARIANTS:
        assert MODELS.get(f'mmtoken.{name}') is getattr(backbones, name)


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('size', [(64, 64), (97, 131), (33, 250), (20, 20), (1, 1)])
def test_any_size(cfg, size):
    model = build(cfg).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    assert isinstance(maps, tuple) and len(maps) == 4
    for i, (map_, channels) in enumerate(zip(maps, model.out_channels, strict=True)):
        stride = 4 * 2**i
        assert map_.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert map_.isfinite().all()


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
    model = build(cfg).train()
    loss = sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(2, 3, 100, 140)))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'no gradient for {name}'
        assert parameter.grad.isfinite().all(), f'bad gradient for {name}'
        # A key bias shifts all scores of a query alike: its exact gradient is zero.
        if not name.endswith(('kv.bias', 'qkv.bias')):
            assert parameter.grad.abs().sum() > 0, f'zero gradient for {name}'


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages_stay_frozen(cfg, frozen_stages):
    model = build(cfg, frozen_stages=frozen_stages)
    model.train()
    before = copy.deepcopy(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    maps = model(torch.randn(2, 3, 64, 64))
    if parameters:
        sum((m * torch.randn_like(m)).mean() for m in maps).backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

    frozen = ('patch_embed.',) if frozen_stages >= 0 else ()
    for i in range(frozen_stages):
        frozen += (f'layers.{i}.', f'norm{i}.')
    assert not [k for k in changed if k.startswith(frozen)]
    trained = [k for k in before if not k.startswith(frozen)]
    assert bool(trained) == bool(changed)
    assert ('patch_embed.proj.0.bn.running_mean' in changed) == (frozen_stages < 0)


@pytest.mark.parametrize('cfg', CASES)
def test_norm_eval(cfg):
    model = build(cfg, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('cfg', CASES)
def test_checkpointing_changes_nothing(cfg):
    plain, recomputed = build(cfg, norm_eval=True), build(cfg, norm_eval=True, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 80, 100)
    for model in (plain, recomputed):
        model.train()
        sum(m.square().mean() for m in model(image)).backward()
    grads = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, msg=name)


@pytest.mark.parametrize('cfg', CASES)
def test_out_indices(cfg):
    model, image = build(cfg).eval(), torch.randn(1, 3, 70, 90)
    some = build(cfg, out_indices=(1, 2)).eval()
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
    sum(m.sum() for m in model.train()(torch.cat([image, image]))).backward()


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
        assert num_layers == sum(len(stage.blocks) for stage in model.layers) + 2
        depths[name] = depth
    assert set(depths.values()) == set(range(num_layers))
    assert depths['patch_embed.proj.0.c.weight'] == 0
    assert (
        depths['layers.0.blocks.1.norm1.weight'] == depths['layers.0.downsample.norm.weight'] == 2
    )
    assert depths['norm3.weight'] == num_layers - 1
    assert model.get_layer_depth('decode_head.conv.weight', 'backbone.')[0] == num_layers - 1


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize(
    'bad, error, message',
    [
        (dict(arch='huge'), ValueError, "'huge'; known are"),
        (dict(arch=7), TypeError, 'a name or a dict, got int'),
        (dict(arch=dict(depth=3)), ValueError, r"got \['depth'\]"),
        (dict(out_indices=(4,)), ValueError, 'from 0 to 3'),
        (dict(out_indices=(2, 1)), ValueError, 'rising'),
        (dict(out_indices=()), ValueError, 'rising'),
        (dict(frozen_stages=5), ValueError, 'from -1 to 4, got 5'),
    ],
)
def test_bad_arguments(cfg, bad, error, message):
    with pytest.raises(error, match=message):
        build(cfg, **bad)
