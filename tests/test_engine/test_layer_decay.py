"""Layer-wise learning rates for our backbones, and next to mmpretrain's constructor."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import LinearLR, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmtoken.engine import LayerDecayOptimWrapperConstructor, layer_decay

RATE, LR, DECAY = 0.5, 0.1, 0.05
VIT = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=48)
BACKBONES = {
    'STViTRSwin': dict(
        arch=dict(embed_dims=16, depths=(2, 1, 6, 1), num_heads=(1, 2, 2, 4)),
    ),
    'STViTDeiT': dict(arch=VIT, base_layers=2, img_size=64, out_indices=(1, 3)),
    'DGEPVT': dict(
        arch=dict(
            embed_dims=(16, 32, 40, 64),
            depths=(1, 2, 1, 1),
            num_heads=(1, 2, 5, 4),
            mlp_ratios=(4, 2, 2, 2),
            sr_ratios=(8, 4, 2, 1),
        )
    ),
    'DGEDPVT': dict(
        arch=dict(
            embed_dims=(16, 32, 40, 64),
            depths=(1, 2, 1, 1),
            num_heads=(1, 2, 5, 4),
            mlp_ratios=(4, 2, 2, 2),
        )
    ),
    'DGEDeiT': dict(arch=VIT, img_size=64, out_indices=(1, 3), cls_token=True),
    'SWATSwin': dict(arch=dict(embed_dims=32, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4))),
    'SWATDeiT': dict(
        arch=dict(VIT, patch_size=16, mlp_kernel=3), plane_size=4, img_size=64, out_indices=(1, 3)
    ),
    'PSViT': dict(arch=dict(stages=[(16, 2, (2,)), (32, 2, (1, 2)), (48, 3, (1,))]), img_size=64),
}


class Layers(nn.Module):
    """The least that gives depths: ``stem``, then ``layers``, then ``norm``."""

    def __init__(self, num_layers=2):
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_layers))
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        for layer in (self.stem, *self.layers):
            x = layer(x)
        return self.norm(x)

    def get_layer_depth(self, param_name, prefix=''):
        assert param_name.startswith(prefix)
        part, index = param_name[len(prefix) :].split('.')[:2]
        num_layers = len(self.layers) + 2
        if part == 'layers':
            return int(index) + 1, num_layers
        return (0 if part == 'stem' else num_layers - 1), num_layers


class Model(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = Layers() if backbone is None else backbone
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def make_backbone(name):
    return MODELS.build(dict(type=f'mmtoken.{name}', **BACKBONES[name]))


def build(model, rate=RATE, optimizer=None, wrapper=None, **paramwise):
    optimizer = optimizer or dict(type='AdamW', lr=LR, weight_decay=DECAY)
    cfg = Config(
        dict(
            optim_wrapper=dict(
                constructor='mmtoken.LayerDecayOptimWrapperConstructor',
                optimizer=optimizer,
                paramwise_cfg=dict(layer_decay_rate=rate, **paramwise),
                **(wrapper or {}),
            )
        )
    )
    return build_optim_wrapper(model, cfg.optim_wrapper)


def settings(model, wrapper, key='lr'):
    """What each parameter is trained with, by name. Every parameter has one group."""
    found = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            assert parameter not in found
            found[parameter] = group[key]
    return {name: found[p] for name, p in model.named_parameters() if p in found}


def close(values):
    return pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones(name):
    model = Model(make_backbone(name))
    wrapper = build(model)
    lrs = settings(model, wrapper)
    assert lrs.keys() == dict(model.named_parameters()).keys()
    depths = {
        n: model.backbone.get_layer_depth(n, prefix='backbone.')
        for n in lrs
        if n.startswith('backbone.')
    }
    for n, (depth, num_layers) in depths.items():
        assert lrs[n] == close(LR * RATE ** (num_layers - 1 - depth)), n
    assert lrs['head.weight'] == lrs['head.bias'] == LR
    lowest = {n for n in lrs if lrs[n] == min(lrs.values())}
    assert lowest == {n for n, (depth, _) in depths.items() if depth == 0}
    assert any('patch_embed' in n for n in lowest)
    # One group per learning rate, the stem's first, and each tells what it holds.
    groups = wrapper.optimizer.param_groups
    assert len(groups) == len(set(lrs.values()))
    names = {p: n for n, p in model.named_parameters()}
    for group in groups:
        assert group['param_names'] == [names[p] for p in group['params']]
    assert groups[0]['param_names'][0] in lowest


@pytest.mark.parametrize('name', ['DGEPVT', 'DGEDeiT', 'STViTDeiT'])
def test_rules_of_mmengine_multiply(name):
    model = Model(make_backbone(name))
    plain = settings(model, build(model))
    rules = dict(
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        custom_keys=dict(router=dict(lr_mult=0.1), pos_embed=dict(decay_mult=0.0)),
    )
    wrapper = build(model, **rules)
    lrs, decays = settings(model, wrapper), settings(model, wrapper, 'weight_decay')
    norms = {
        f'{module_name}.{parameter_name}'
        for module_name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for parameter_name, _ in module.named_parameters()
    }
    assert any('router' in n for n in lrs) == name.startswith('DGE')
    assert any('pos_embed' in n for n in lrs)
    for n, lr in lrs.items():
        mult = 1
        if 'router' in n:
            mult = 0.1
        elif n.endswith('.bias') and n not in norms:
            mult = 2
        assert lr == close(mult * plain[n]), n
        assert decays[n] == (0 if n in norms or 'pos_embed' in n else DECAY), n


def test_settings_of_custom_keys_are_kept_and_tell_groups_apart():
    model = Model()
    betas = (0.5, 0.9)
    wrapper = build(model, custom_keys={'layers.0': dict(betas=betas), 'head': dict(lr_mult=1.0)})
    found = settings(model, wrapper, 'betas')
    assert [n for n, b in found.items() if tuple(b) == betas] == [
        'backbone.layers.0.weight',
        'backbone.layers.0.bias',
    ]
    groups = wrapper.optimizer.param_groups
    assert [(g['lr'], g['param_names'][0]) for g in groups] == [
        (close(LR / 8), 'backbone.stem.weight'),
        (close(LR / 4), 'backbone.layers.0.weight'),
        (close(LR / 2), 'backbone.layers.1.weight'),
        (LR, 'backbone.norm.weight'),
        (LR, 'head.weight'),
    ]


def test_rate_one_is_mmengines_default():
    model = Model(make_backbone('DGEDeiT'))
    rules = dict(norm_decay_mult=0.0, flat_decay_mult=0.1, bias_lr_mult=3.0)
    ours = build(model, rate=1, **rules)
    default = build_optim_wrapper(
        model,
        dict(optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY), paramwise_cfg=rules),
    )
    for key in ('lr', 'weight_decay'):
        assert settings(model, ours, key) == settings(model, default, key)
    assert len(ours.optimizer.param_groups) < len(default.optimizer.param_groups)


def test_parameters_without_gradient_are_left_out():
    model = Model()
    model.backbone.stem.requires_grad_(False)
    lrs = settings(model, build(model))
    assert not [n for n in lrs if 'stem' in n]
    assert min(lrs.values()) == close(LR / 4)


def test_frozen_stages_are_left_out():
    cfg = dict(type='mmtoken.DGEPVT', **BACKBONES['DGEPVT'], frozen_stages=1)
    model = Model(MODELS.build(cfg))
    lrs = settings(model, build(model))
    assert not [n for n in lrs if n.startswith('backbone.layers.0.')]


@pytest.mark.parametrize('where', ['itself', 'wrapped', 'nested', 'compiled'])
def test_where_the_backbone_is(where):
    layers = Layers()
    if where == 'itself':
        model, start = layers, ''
    elif where == 'wrapped':
        model, start = nn.DataParallel(Model(layers)), 'module.backbone.'
    elif where == 'nested':
        model, start = nn.ModuleDict(dict(detector=Model(layers))), 'detector.backbone.'
    else:  # it hands out get_layer_depth of what it holds, under other names
        model, start = Model(torch.compile(layers)), 'backbone._orig_mod.'
    lrs = settings(model, build(model))
    expected = dict(stem=LR / 8, norm=LR, **{'layers.0': LR / 4, 'layers.1': LR / 2})
    for part, lr in expected.items():
        assert lrs[f'{start}{part}.weight'] == close(lr)
    assert all(lr == LR for n, lr in lrs.items() if '.head.' in n)


def test_several_backbones_each_have_their_depth():
    model = nn.ModuleDict(dict(rgb=Layers(1), depth=Layers(3), fuse=nn.Linear(2, 2)))
    lrs = settings(model, build(model))
    assert lrs['rgb.stem.weight'] == close(LR / 4)
    assert lrs['depth.stem.weight'] == close(LR / 16)
    assert lrs['rgb.layers.0.weight'] == lrs['depth.layers.2.weight'] == close(LR / 2)
    assert lrs['fuse.weight'] == LR


def test_the_outer_one_speaks_for_both():
    class Outer(Model):
        def get_layer_depth(self, param_name, prefix=''):
            return (0 if param_name.startswith(f'{prefix}backbone.') else 1), 2

    model = nn.Sequential(Outer())
    lrs = settings(model, build(model))
    assert {lr for n, lr in lrs.items() if 'backbone' in n} == {LR / 2}
    assert lrs['0.head.weight'] == LR


def test_shared_parameters():
    model = Model()
    model.head.weight = model.backbone.layers[0].weight
    with pytest.raises(ValueError, match=r'backbone.layers.0.weight is shared.*bypass_duplicate'):
        build(model)
    lrs = settings(model, build(model, bypass_duplicate=True))
    assert lrs['backbone.layers.0.weight'] == close(LR / 4)


@pytest.mark.parametrize(
    'rate', [None, 'high', True, 0, -0.5, 1.01, float('nan'), pytest.param(1j, id='complex')]
)
def test_bad_rate(rate):
    with pytest.raises(ValueError, match='layer_decay_rate above 0 and up to 1, got'):
        build(Model(), rate=rate)


@pytest.mark.parametrize('paramwise', [None, {}, dict(decay_rate=0.7, num_layers=12)])
def test_a_rate_must_be_given(paramwise):
    with pytest.raises(ValueError, match='must have a layer_decay_rate .* got None'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=LR)), paramwise)


def test_a_learning_rate_must_be_given():
    with pytest.raises(ValueError, match='needs `lr`'):
        build(Model(), optimizer=dict(type='AdamW'))


def test_a_model_without_depths():
    with pytest.raises(TypeError, match='get_layer_depth.*this Sequential'):
        build(nn.Sequential(nn.Linear(2, 2)))


def step(model, wrapper):
    with wrapper.optim_context(model):
        loss = model(torch.ones(1, 2, device=model.head.weight.device)).square().sum()
    wrapper.update_params(loss)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='MMEngine wants a GPU for AMP')


@pytest.mark.parametrize(
    'kind',
    [
        dict(type='OptimWrapper', accumulative_counts=2, clip_grad=dict(max_norm=1.0)),
        pytest.param(dict(type='AmpOptimWrapper', clip_grad=dict(max_norm=1.0)), marks=CUDA),
    ],
    ids=lambda kind: kind['type'],
)
def test_training_goes_on_from_a_saved_state(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        model = Model().to('cuda' if kind['type'] == 'AmpOptimWrapper' else 'cpu')
        return model, build(model, wrapper=kind, norm_decay_mult=0.0, bias_lr_mult=2.0)

    model, wrapper = make()
    assert type(wrapper).__name__ == kind['type']
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        step(model, wrapper)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.save(dict(model=model.state_dict(), optimizer=wrapper.state_dict()), tmp_path / 's.pth')

    other, resumed = make()
    state = torch.load(tmp_path / 's.pth', weights_only=True)
    other.load_state_dict(state['model'])
    resumed.load_state_dict(state['optimizer'])
    assert settings(other, resumed, 'lr') == settings(model, wrapper, 'lr')
    for _ in range(2):
        step(model, wrapper)
        step(other, resumed)
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_schedule_keeps_the_ratios():
    model = Model()
    wrapper = build(model, optimizer=dict(type='SGD', lr=LR))
    lrs = settings(model, wrapper)
    assert settings(model, wrapper, 'lr') == lrs and wrapper.get_lr()['base_lr'] == [LR]
    schedule = LinearLR(wrapper, start_factor=0.1, begin=0, end=5, by_epoch=False)
    for i in range(6):
        factor = min(1, 0.1 + 0.9 * i / 4)
        now = settings(model, wrapper)
        assert now == {n: close(factor * lr) for n, lr in lrs.items()}
        assert wrapper.get_lr()['base_lr'] == [close(factor * LR)]
        step(model, wrapper)
        schedule.step()


@pytest.fixture
def scope(request):
    library = request.param
    import_modules_from_strings([f'{library}.models'])
    # Other tests are not to see the scope; taken back as MMEngine takes back one of its own.
    with DefaultScope.overwrite_default_scope(library):
        yield library


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'], indirect=True)
def test_a_model_of_another_library(scope):
    backbone = dict(type='mmtoken.DGEDeiT', **BACKBONES['DGEDeiT'])
    if scope == 'mmdet':
        cfg = dict(
            type='RetinaNet',
            backbone=backbone,
            neck=dict(type='FPN', in_channels=[32, 32], out_channels=8, num_outs=2),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=2,
                in_channels=8,
                feat_channels=8,
                anchor_generator=dict(
                    type='AnchorGenerator', scales=[1], ratios=[1.0], strides=[16, 32]
                ),
            ),
        )
    else:
        head = dict(type='FCNHead', in_channels=32, in_index=1, channels=8, num_classes=3)
        cfg = dict(type='EncoderDecoder', backbone=backbone, decode_head=head)
    model = MODELS.build(Config(cfg)._cfg_dict)
    lrs = settings(model, build(model))
    assert lrs.keys() == dict(model.named_parameters()).keys()
    assert lrs['backbone.patch_embed.proj.weight'] == close(LR * RATE**5)
    assert lrs['backbone.blocks.3.norm1.weight'] == close(LR * RATE)
    rest = {n: lr for n, lr in lrs.items() if not n.startswith('backbone.')}
    assert len(rest) > 1 and set(rest.values()) == {LR}


def classifier(backbone):
    head = dict(type='LinearClsHead', num_classes=2, in_channels=32)
    return MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head))


THEIR_VIT = dict(type='VisionTransformer', arch=VIT, img_size=64, patch_size=16)


@pytest.mark.parametrize('scope', ['mmpretrain'], indirect=True)
@pytest.mark.parametrize(
    'backbone',
    [
        *(dict(type=f'mmtoken.{n}', **BACKBONES[n]) for n in ('DGEDeiT', 'STViTDeiT')),
        THEIR_VIT,
        dict(THEIR_VIT, type='DistilledVisionTransformer'),
    ],
    ids=lambda backbone: backbone['type'],
)
def test_same_as_mmpretrains_constructor(scope, backbone):
    """They agree on every parameter and both settings.

    But for what theirs leaves out: of custom keys it takes no ``lr_mult``, and it has neither
    ``bias_lr_mult`` nor the rules for convolutions.
    """
    model = classifier(backbone)
    rules = dict(norm_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0)))
    theirs = build_optim_wrapper(
        model,
        dict(
            constructor='LearningRateDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
            paramwise_cfg=dict(layer_decay_rate=RATE, **rules),
        ),
    )
    ours = build(model, **rules)
    for key in ('lr', 'weight_decay'):
        assert settings(model, ours, key) == close(settings(model, theirs, key))
    assert settings(model, ours)['head.fc.weight'] == LR


@pytest.mark.parametrize('scope', ['mmpretrain'], indirect=True)
def test_ours_next_to_mmpretrains_vit(scope):
    """Layers of the same place have the same learning rate, whoever has made the backbone."""
    ours = classifier(dict(type='mmtoken.DGEDeiT', **BACKBONES['DGEDeiT']))
    theirs = classifier(THEIR_VIT)
    ours, theirs = (settings(model, build(model)) for model in (ours, theirs))
    same = dict(norm='ln1', **{f'blocks.{i}.mlp': f'layers.{i}.ffn' for i in range(4)})
    same.update(cls_token='cls_token', pos_embed='pos_embed', patch_embed='patch_embed')
    for our_part, their_part in same.items():
        our, their = (
            {lr for n, lr in lrs.items() if f'{n}.'.startswith(f'backbone.{part}.')}
            for lrs, part in ((ours, our_part), (theirs, their_part))
        )
        assert len(our) == 1 and our == their, our_part


def test_a_table_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr(layer_decay, 'print_log', lambda text, logger: lines.append((text, logger)))
    build(Model(), optimizer=dict(type='SGD', lr=LR), custom_keys=dict(bias=dict(lr_mult=0.1)))
    [(table, logger)] = lines
    assert logger == 'current'
    assert table.splitlines() == [
        'Learning rates, each layer 0.5 times the next:',
        '  layer         parameters  lr',
        '  backbone 0             6  0.00125, 0.0125',
        '  backbone 1             6  0.0025, 0.025',
        '  backbone 2             6  0.005, 0.05',
        '  backbone 3             4  0.01, 0.1',
        '  all else               6  0.01, 0.1',
    ]
