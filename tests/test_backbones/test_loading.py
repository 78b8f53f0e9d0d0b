"""By whichever road weights come, they are right, or there is an error, in every backbone."""

import copy

import pytest
import torch
from families import FAMILIES, PVT, SWIN, VIT
from helpers import wake
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, PretrainedInit
from mmengine.runner import load_checkpoint
from torch import nn

from mmtoken import backbones, necks
from mmtoken.checkpoints import load_into

from .test_contract import CASES, build, train

ONE_OF_EACH = [
    dict(type=f'mmtoken.{name}', **family.variants[0]) for name, family in FAMILIES.items()
]
INIT = dict(type='TruncNormal', layer='Linear', std=0.5)
each = pytest.mark.parametrize('cfg', ONE_OF_EACH, ids=lambda cfg: cfg['type'])


class Whole(BaseModule):
    """A detector, as far as loading is concerned."""

    def __init__(self, backbone, init_cfg=None):
        super().__init__(init_cfg)
        self.backbone = backbone
        self.head = nn.Linear(3, 3)


@pytest.fixture
def save(tmp_path):
    def save_to(state, name='weights.pth'):
        torch.save(dict(state_dict=state), tmp_path / name)
        return str(tmp_path / name)

    return save_to


@pytest.fixture
def log(monkeypatch):
    """What is logged about weights."""
    lines = []
    for place in ('module', 'load'):
        monkeypatch.setattr(
            f'mmtoken.checkpoints.{place}.print_log', lambda text, **_: lines.append(text)
        )
    return lines


def awake(cfg, **kwargs):
    torch.manual_seed(1)
    model = build(cfg, **kwargs)
    wake(model)
    return model


def assert_same(model, source):
    expected = source.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


FORMS = {
    'dict': lambda file: dict(type='Pretrained', checkpoint=file),
    'class': lambda file: dict(type=PretrainedInit, checkpoint=file),
    'scope': lambda file: dict(type='mmengine.Pretrained', checkpoint=file),
    'config': lambda file: ConfigDict(type='Pretrained', checkpoint=file, map_location='cpu'),
    'list': lambda file: [dict(type='Pretrained', checkpoint=file)],
    'first': lambda file: [dict(type='Pretrained', checkpoint=file), INIT],
    'last': lambda file: [INIT, dict(type=PretrainedInit, checkpoint=file)],
    'two': lambda file: [dict(type='Pretrained', checkpoint=file)] * 2,
}


@each
@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_init_cfg(cfg, form, save):
    source = awake(cfg)
    model = build(cfg, init_cfg=FORMS[form](save(source.state_dict())))
    model.init_weights()
    assert_same(model, source)


@each
@pytest.mark.parametrize('form', FORMS)
def test_junk_is_refused_in_every_form(cfg, form, save):
    model = build(cfg, init_cfg=FORMS[form](save(dict(x=torch.zeros(1)))))
    for _ in range(2):  # what failed once is not taken for done
        with pytest.raises(ValueError, match='does not fit'):
            model.init_weights()


@each
def test_the_model_that_it_is_part_of(cfg, save):
    """``init_cfg`` of a detector, ``load_from``, and ``load_state_dict`` by hand."""
    source = Whole(awake(cfg))
    file = save(source.state_dict())
    whole = Whole(build(cfg), init_cfg=[dict(type='Pretrained', checkpoint=file)])
    whole.init_weights()
    assert_same(whole, source)
    for load in (
        lambda model: load_checkpoint(model, file),
        lambda model: model.load_state_dict(source.state_dict()),
        lambda model: load_checkpoint(model.backbone, file),  # of which its head is left out
    ):
        whole = Whole(build(cfg))
        load(whole)
        assert_same(whole.backbone, source.backbone)


@each
@pytest.mark.parametrize('road', ['load_from', 'state_dict'])
def test_weights_of_something_else_are_refused(cfg, road, save):
    whole = Whole(build(cfg))
    before = copy.deepcopy(whole.state_dict())
    state = {f'backbone.layer{i}.0.conv.weight': torch.zeros(3, 3) for i in range(4)}
    with pytest.raises(ValueError, match=r'\(backbone\): does not fit'):
        if road == 'load_from':
            load_checkpoint(whole, save(state))
        else:
            whole.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


@each
def test_a_part_of_the_weights_is_reported(cfg, save, log):
    source, model = awake(cfg), build(cfg)
    own = {name: t for name, t in source.state_dict().items() if 'blocks.0.mlp' in name}
    load_checkpoint(Whole(model), save({f'backbone.{name}': t for name, t in own.items()}))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in own.items())
    assert f'lacks {len(model.state_dict()) - len(own)} of' in ''.join(log)


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('last', [0, -2])
def test_what_nothing_uses_is_not_built(cfg, last, save):
    """Stages behind the last output; files of the whole network still fit, by all roads."""
    whole = awake(cfg)
    index = range(family(cfg).num_stages)[last]
    stopped = dict(out_indices=(index,))
    model = build(cfg, **stopped)
    maps, inner = train(model, torch.randn(2, 3, 100, 140))
    (sum((m * torch.randn_like(m)).sum() for m in maps) + inner).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    file = save(whole.state_dict())
    for load in (
        lambda model: load_into(model, file),
        lambda model: load_checkpoint(model, file),
        lambda model: model.load_state_dict(whole.state_dict(), strict=False),
    ):
        model = build(cfg, **stopped)
        load(model)
        shared = model.state_dict().keys() & whole.state_dict().keys()
        assert all(torch.equal(model.state_dict()[n], whole.state_dict()[n]) for n in shared)


def family(cfg):
    return FAMILIES[cfg['type'].removeprefix('mmtoken.')]


@pytest.mark.parametrize('cfg', CASES)
@pytest.mark.parametrize('used', [slice(1, None), slice(None, 1)])
def test_a_neck_may_leave_maps_out(cfg, used):
    """As with ``start_level=1``: DDP wants a gradient for each parameter, if it is zero."""
    model = build(cfg)
    maps, inner = train(model, torch.randn(2, 3, 100, 140))
    (sum((m * torch.randn_like(m)).sum() for m in maps[used]) + inner).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_maps_can_be_changed_in_place():
    maps = build(ONE_OF_EACH[0]).train()(torch.randn(2, 3, 64, 64))
    sum(nn.functional.relu(m, inplace=True).sum() for m in maps).backward()


def test_three_stages_of_a_four_stage_file(save):
    whole = backbones.STViTRSwin(SWIN)
    three = {name: values[:3] if name != 'embed_dims' else values for name, values in SWIN.items()}
    model = backbones.STViTRSwin(three, out_indices=(0, 1, 2))
    load_into(model, save(whole.state_dict()))
    assert_same(model, whole)
    with pytest.raises(ValueError, match=r'names it should not have: blocks\.4'):
        load_into(
            backbones.DGEDeiT(dict(VIT, num_layers=4)),
            save(backbones.DGEDeiT(VIT).state_dict()),
        )


POSITIONS = [
    (name, family.size[1], family.size[0]) for name, family in FAMILIES.items() if family.size
]


@pytest.mark.parametrize('name, args, size', POSITIONS)
@pytest.mark.parametrize('sizes', [(224, 128), (128, 224)])
@pytest.mark.parametrize('road', ['init_cfg', 'load_from', 'state_dict', 'load_into'])
def test_positions_are_resampled_once(name, args, size, sizes, road, save):
    """A model laid out for another image computes what the file's own would, at any size."""
    make = getattr(backbones, name)
    torch.manual_seed(0)
    source = make(**{**args, size: sizes[0]})
    wake(source)
    file, model = save(source.state_dict()), make(**{**args, size: sizes[1]})
    parameters = [id(p) for p in model.parameters()]
    if road == 'init_cfg':
        init_cfg = dict(type='Pretrained', checkpoint=file)
        model = make(**{**args, size: sizes[1]}, init_cfg=init_cfg)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        model.init_weights()  # by now, an optimizer may have copies of these shapes
        assert shapes == {name: p.shape for name, p in source.named_parameters()}
    elif road == 'load_from':
        load_checkpoint(
            Whole(model), save({f'backbone.{n}': t for n, t in source.state_dict().items()})
        )
    elif road == 'state_dict':
        model.load_state_dict(source.state_dict())
    else:
        load_into(model, file)
    if road != 'init_cfg':
        assert parameters == [id(p) for p in model.parameters()]
    image = torch.randn(1, 3, 160, 96)
    with torch.no_grad():
        for ours, expected in zip(model.eval()(image), source.eval()(image), strict=True):
            assert torch.equal(ours, expected)
    again = make(**{**args, size: sizes[1]})
    again.load_state_dict(copy.deepcopy(model).state_dict())
    assert_same(again, source)


@each
@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_other_input_channels(cfg, channels, save, log):
    """As in timm: what an image says that is grey in all channels, or alike in all of them."""
    source = awake(cfg)
    model = build(cfg, in_channels=channels)
    load_into(model, save(source.state_dict()))
    assert f'takes {channels} channels, from weights for 3' in ''.join(log)
    grey = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        expected = source.eval()(grey.expand(-1, 3, -1, -1))
        if channels in (1, 6):
            for ours, theirs in zip(
                model.eval()(grey.expand(-1, channels, -1, -1)), expected, strict=True
            ):
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match='set in_channels to that of the file'):
        load_into(source, save(model.state_dict()))


@each
def test_pretrained(cfg, save):
    """mmseg's models hand theirs to the backbone."""
    source = awake(cfg)
    file = save(source.state_dict())
    model = build(cfg, pretrained=file)
    model.init_weights()
    assert_same(model, source)
    init_cfg = dict(type='Pretrained', checkpoint=file)
    model = build(cfg, pretrained='open-mmlab://resnet50_v1c', init_cfg=init_cfg)
    model.init_weights()
    assert_same(model, source)
    with pytest.raises(ValueError, match=r'set model=dict\(pretrained=None\) and give .* init_cfg'):
        build(cfg, pretrained='open-mmlab://resnet50_v1c')
    assert build(cfg, pretrained=None).init_cfg is None


@each
@pytest.mark.parametrize(
    'bad, error, message',
    [
        (dict(init_cfg='weights.pth'), TypeError, r"write init_cfg=dict\(type='Pretrained'"),
        (dict(init_cfg=dict(checkpoint='a.pth')), ValueError, 'has no type'),
        (dict(init_cfg=[dict(type='Pretrained')]), ValueError, 'names no checkpoint'),
        (dict(init_cfg=['a.pth']), TypeError, 'which is no dict'),
        (dict(embed_dims=96), TypeError, 'takes no embed_dims: it belongs into arch'),
        (dict(norm_cfg=dict(type='LN')), TypeError, 'leave it out'),
        (dict(colour='red'), TypeError, 'takes no colour: it takes arch'),
        (dict(pretrained=7), TypeError, 'is no file'),
    ],
)
def test_arguments_of_other_backbones(cfg, bad, error, message):
    with pytest.raises(error, match=message):
        build(cfg, **bad)


@each
def test_one_number_for_one_output(cfg):
    assert build(cfg, out_indices=2).out_indices == (2,)


def test_one_number_for_a_sequence():
    """Where a sequence of one means something; elsewhere it is refused by name."""
    assert backbones.DGEPVT(PVT, granularities=1).granularities == (1,)
    args = FAMILIES['PSViT'].variants[0]
    stages = backbones.PSViT(**{**args, 'window_sizes': 7}).layers
    assert [stage.window_size for stage in stages] == [7, 7, 7]
    vit = backbones.MSViT(VIT, cls_token=False, window_size=4, global_blocks=-1)
    assert vit.global_blocks == {5}
    with pytest.raises(ValueError, match=r'key_sizes are three sides .* got \(14,\)'):
        backbones.STViTRSwin(SWIN, key_sizes=14)
    with pytest.raises(ValueError, match=r'behind a backbone of several widths use FPN'):
        necks.SimpleFeaturePyramid([96, 192])
    assert len(necks.SimpleFeaturePyramid([32, 32], 8, scales=1, num_outs=1).levels) == 1


@pytest.mark.parametrize(
    'make',
    [
        lambda **kwargs: necks.SimpleFeaturePyramid(32, 8, **kwargs),
        lambda **kwargs: necks.SemanticRecoveryNeck(32, 2, out_channels=8, **kwargs),
        lambda **kwargs: necks.MixedScaleNeck(32, refine=True, out_channels=8, **kwargs),
        lambda **kwargs: necks.GrainUnpoolNeck(32, 2, out_channels=8, **kwargs),
    ],
)
@pytest.mark.parametrize('form', FORMS)
def test_necks_load_as_strictly(make, form, save):
    source = make()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = {f'neck.{name}': tensor for name, tensor in source.state_dict().items()}
    neck = make(init_cfg=FORMS[form](save({**state, 'backbone.stem.weight': torch.zeros(1)})))
    neck.init_weights()
    assert_same(neck, source)
    neck = make(init_cfg=FORMS[form](save(dict(x=torch.zeros(1)))))
    with pytest.raises(ValueError, match='does not fit'):
        neck.init_weights()
    with pytest.raises(TypeError, match='takes no colour'):
        make(colour='red')
