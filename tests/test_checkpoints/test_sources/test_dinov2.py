"""DINOv2 as released, as trained, and of other libraries."""

import re

import pytest
import torch
from mmpretrain.models.backbones import DeiT3
from mmpretrain.models.backbones import VisionTransformer as MMPretrainViT
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from mmtoken.backbones import STViTRSwin
from mmtoken.checkpoints import convert, detect_source, load_into

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
TIMM = dict(img_size=56, patch_size=14, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2)
UNSCALED = dict(init_values=None)


class MixedViT(nn.Module):
    """Has the names of a plain ViT of mixed-scale tokens, and computes as one of a single scale."""

    ignorable_keys = r'(head|norm|fc_norm)\..*|cls_token'

    def __init__(
        self, layer_scale=True, num_registers=0, cls_token=True, pos_grid=(4, 4), patch_size=14
    ):
        super().__init__()
        vit = TimmViT(
            **{**TIMM, 'patch_size': patch_size}, init_values=0.1 if layer_scale else None
        )
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.pos_grid, rows_and_columns = pos_grid, pos_grid[0] * pos_grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32)) if cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, 32)) if num_registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, cls_token + rows_and_columns, 32))
        self.gate = nn.Linear(4, 1)
        self.gate_loss = nn.BatchNorm1d(1)
        self.patch_embed_coarse = nn.ModuleDict(dict(proj=nn.Conv2d(3, 32, 28, 28)))

    def forward(self, x):
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LenientViT(MixedViT):
    """May lack what a ViT has not, so names of timm pass for its own."""

    newly_initialized_keys = r'(gate|gate_loss|patch_embed_coarse)\..*'


def timm_vit(num_registers=0, **kwargs):
    registers = dict(reg_tokens=num_registers, no_embed_class=True) if num_registers else {}
    return TimmViT(**{**TIMM, 'init_values': 0.1, 'num_classes': 0, **registers, **kwargs})


def official(num_registers=0, grid=4, chunked=False):
    """Random weights with the names of the released files, or of training."""
    state = {name: torch.randn_like(t) for name, t in timm_vit().state_dict().items()}
    state['mask_token'] = torch.randn(1, 32)
    state['pos_embed'] = torch.randn(1, 1 + grid**2, 32)
    if num_registers:
        state['register_tokens'] = torch.randn(1, num_registers, 32)
    if chunked:
        state = {chunk(name): tensor for name, tensor in state.items()}
    return state


def chunk(name):
    """Of two chunks: the first has blocks 0 and 1, the second has block 2, which is counted on."""
    return re.sub(r'^blocks\.(\d)', lambda found: f'blocks.{int(found[1]) // 2}.{found[1]}', name)


def check(ours, weights, report):
    """The model has all of ``weights``, and all else of it but the coarse projection is fresh."""
    state = ours.state_dict()
    fresh = ('gate.', 'gate_loss.')
    derived = {name for name in state if name.startswith('patch_embed_coarse.')}
    assert set(report.newly_initialized) == set(state) - set(weights) - derived
    assert all(name.startswith(fresh) for name in report.newly_initialized)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize('num_registers', [0, 4])
@pytest.mark.parametrize('cls_token', [True, False])
def test_released(num_registers, cls_token, save):
    state = official(num_registers)
    assert detect_source(state) == 'dinov2'
    ours = MixedViT(num_registers=num_registers, cls_token=cls_token)
    report = load_into(ours, save(state))
    assert report.origin == 'dinov2 (official names)'
    assert set(report.dropped) == {'mask_token'} | (set() if cls_token else {'cls_token'})
    state.pop('mask_token')
    if num_registers:
        state['reg_token'] = state.pop('register_tokens')
    if not cls_token:
        state.pop('cls_token')
        state['pos_embed'] = state['pos_embed'][:, 1:]
    check(ours, state, report)


@pytest.mark.parametrize('start', ['', 'backbone.'])
@pytest.mark.parametrize('chunked', [True, False])
def test_teacher_as_it_is_saved(start, chunked, save):
    plain = official(4)
    state = {start + (chunk(name) if chunked else name): plain[name] for name in plain}
    if start:
        state['dino_head.mlp.0.weight'] = state['ibot_head.last_layer.weight_g'] = torch.zeros(1)
    ours = MixedViT(num_registers=4)
    report = load_into(ours, save(dict(teacher=state)))
    assert report.origin == 'dinov2 (official names)'
    plain['reg_token'] = plain.pop('register_tokens')
    del plain['mask_token']
    check(ours, plain, report)
    assert report.mapped['blocks.2.norm1.bias'] == f'blocks.{"1.2" if chunked else "2"}.norm1.bias'


def test_teacher_beside_the_student(save):
    teacher, student = official(chunked=True), official(chunked=True)
    state = {f'student.backbone.{name}': tensor for name, tensor in student.items()}
    state.update({f'teacher.backbone.{name}': tensor for name, tensor in teacher.items()})
    state['teacher.dino_head.mlp.0.weight'] = state['dino_loss.center'] = torch.zeros(1)
    ours = MixedViT()
    report = load_into(ours, save(dict(model=state, iteration=3)))
    assert report.origin == 'dinov2 (training names)'
    key = 'blocks.1.2.mlp.fc1.bias'
    assert torch.equal(ours.blocks[2].mlp.fc1.bias, teacher[key])
    assert report.mapped['blocks.2.mlp.fc1.bias'] == f'teacher.backbone.{key}'
    assert {f'student.backbone.{key}', 'dino_loss.center'} <= set(report.dropped)
    by_prefix = MixedViT()
    load_into(by_prefix, save(state), prefix='student.backbone')
    assert torch.equal(by_prefix.blocks[2].mlp.fc1.bias, student[key])


@pytest.mark.parametrize('num_registers', [0, 4])
def test_timm_computes_the_same(num_registers, save, wake):
    """With registers, timm has added the class token's position to it."""
    theirs = wake(timm_vit(num_registers))
    state = theirs.state_dict()
    assert detect_source(state) == 'dinov2'
    ours = wake(MixedViT(num_registers=num_registers))
    report = load_into(ours, save(state))
    assert report.origin == 'dinov2 (timm names)' and report.dropped == []
    if num_registers:
        assert report.resized == dict(pos_embed=((1, 16, 32), (1, 17, 32)))
        assert not ours.pos_embed[:, 0].any()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(image), theirs.forward_features(image), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize('model', [MixedViT, LenientViT])
@pytest.mark.parametrize('no_embed_class', [True, False])
def test_registers_compute_the_same(model, no_embed_class, save, wake):
    """With and without positions of their own; no layer scale, so this is a ViT of timm."""
    theirs = wake(timm_vit(4, no_embed_class=no_embed_class, init_values=None))
    length = theirs.pos_embed.shape[1]
    assert length == (16 if no_embed_class else 21)
    ours = wake(model(layer_scale=False, num_registers=4))
    report = load_into(ours, save(theirs.state_dict()))
    assert report.source == ('vit' if model is MixedViT else None)
    assert report.resized == dict(pos_embed=((1, length, 32), (1, 17, 32)))
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(image), theirs.forward_features(image), atol=1e-4, rtol=1e-4
        )


def test_mmpretrain_computes_the_same(save, wake):
    theirs = wake(MMPretrainViT(ARCH, 56, 14, layer_scale_init_value=1e-5, out_type='raw'))
    state = {f'backbone.{name}': tensor for name, tensor in theirs.state_dict().items()}
    ours = wake(MixedViT())
    report = load_into(ours, save(dict(state_dict=state)))
    assert report.origin == 'dinov2 (mmpretrain names)' and report.dropped == []
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('library', ['timm', 'mmpretrain'])
def test_deit_iii_has_the_same_names(library, save):
    """Its class token has no position."""
    if library == 'timm':
        theirs = timm_vit(no_embed_class=True)
    else:
        theirs = DeiT3(ARCH, img_size=56, patch_size=14)
    state = theirs.state_dict()
    ours = MixedViT()
    assert load_into(ours, save(state)).origin == f'dinov2 ({library} names)'
    zero = torch.zeros(1, 1, 32)
    assert torch.equal(ours.pos_embed, torch.cat([zero, state['pos_embed']], dim=1))


@pytest.mark.parametrize('library', ['official', 'timm'])
@pytest.mark.parametrize('num_registers', [0, 4])
@pytest.mark.parametrize('cls_token', [True, False])
def test_patches_are_resampled_positions_are_not(library, num_registers, cls_token, save):
    """The release has 37 x 37 positions, for 518 pixels, and patches of 14."""
    if library == 'official':
        state = official(num_registers, grid=37)
        places = state['pos_embed'][:, 1:]
    else:
        state = timm_vit(num_registers, img_size=518).state_dict()
        places = state['pos_embed'][:, -37 * 37 :]
    args = dict(num_registers=num_registers, cls_token=cls_token)
    ours = MixedViT(**args, pos_grid=(6, 8), patch_size=16)
    report = load_into(ours, save(state))
    assert torch.equal(ours.pos_embed[:, cls_token:], places) and ours.pos_grid == (37, 37)
    if cls_token:
        class_position = state['pos_embed'][:, :1]
        if library == 'timm' and num_registers:
            class_position = torch.zeros_like(class_position)
        assert torch.equal(ours.pos_embed[:, :1], class_position)
    assert report.resized.pop('patch_embed.proj.weight') == ((32, 3, 14, 14), (32, 3, 16, 16))
    assert report.grids == dict(pos_embed=(37, 37))


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('no_embed_class', [True, False])
def test_positions_beside_registers(cls_token, no_embed_class, save):
    kwargs = dict(class_token=cls_token, global_pool='avg', fc_norm=False, init_values=None)
    state = timm_vit(4, no_embed_class=no_embed_class, **kwargs).state_dict()
    state['reg_token'], position = torch.randn(1, 4, 32), state['pos_embed']
    ours = MixedViT(False, 4, cls_token, pos_grid=(6, 8))
    load_into(ours, save(state))
    first = torch.zeros(1, cls_token, 32) if no_embed_class else position[:, :cls_token]
    assert torch.equal(ours.pos_embed, torch.cat([first, position[:, -16:]], dim=1))
    assert ours.pos_grid == (4, 4)
    added = 0 if no_embed_class else position[:, cls_token : cls_token + 4]
    assert torch.equal(ours.reg_token, state['reg_token'] + added)


def test_grid_that_is_not_square_beside_registers(save):
    """Our 4 x 6 places and a class token are as many as 5 x 5; of others they are refused."""
    args = dict(num_registers=4, pos_grid=(4, 6))
    saved, loaded = MixedViT(**args), MixedViT(**args)
    nn.init.normal_(saved.pos_embed)
    state = {name: t for name, t in saved.state_dict().items() if not name.startswith('gate')}
    assert load_into(loaded, save(state)).source == 'dinov2'
    assert torch.equal(loaded.pos_embed, saved.pos_embed)
    state = timm_vit(4, img_size=(56, 84)).state_dict()
    with pytest.raises(ValueError, match=r'pos_embed \(1, 24, 32\) instead of \(1, 17, 32\)'):
        load_into(MixedViT(num_registers=4), save(state))


def test_what_is_converted_is_known_again():
    """Official files have timm's names after that."""
    once = convert(official(4, chunked=True), 'dinov2')[0]
    assert set(once) == set(timm_vit(4).state_dict())
    again, report = convert(once, 'dinov2')
    assert report.layout == 'timm' and not report.resized and not report.dropped
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())


def test_own_files_with_registers(save):
    """Registers have no position; 4 x 16 places are no 8 x 8, which makes a square."""
    args = dict(num_registers=4, pos_grid=(4, 16))
    saved, loaded = MixedViT(**args), MixedViT(**args)
    nn.init.normal_(saved.pos_embed)
    report = load_into(loaded, save(saved.state_dict()))
    assert report.source is None and not report.resized
    assert torch.equal(loaded.pos_embed, saved.pos_embed)
    larger = MixedViT(num_registers=4, pos_grid=(6, 8))
    small = MixedViT(num_registers=4)
    nn.init.normal_(small.pos_embed)
    load_into(larger, save(small.state_dict()))
    assert torch.equal(larger.pos_embed, small.pos_embed) and larger.pos_grid == (4, 4)


@pytest.mark.parametrize('layer_scale', [True, False])
def test_gate_is_fresh_as_a_whole(layer_scale, save):
    state = timm_vit(**({} if layer_scale else UNSCALED)).state_dict()
    ours = MixedViT(layer_scale)
    report = load_into(ours, save(state))
    assert report.source == ('dinov2' if layer_scale else 'vit')
    check(ours, state, report)
    state['gate.weight'] = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r'names it lacks: gate\.bias$'):
        load_into(ours, save(state))


@pytest.mark.parametrize(
    'file, args, message',
    [
        (
            dict(num_registers=4),
            {},
            'it has 4 register tokens, MixedViT has 0; set num_registers=4',
        ),
        (
            dict(num_registers=4),
            dict(num_registers=2),
            'it has 4 register tokens, MixedViT has 2; set num_registers=4',
        ),
        (
            {},
            dict(num_registers=4),
            'it has 0 register tokens, MixedViT has 4; set num_registers=0',
        ),
        (UNSCALED, {}, 'MixedViT has layer scale, it has none; set layer_scale=None'),
    ],
)
def test_what_the_model_must_be_built_with(file, args, message, save):
    files = [timm_vit(**file).state_dict()]
    if file is not UNSCALED:
        files.append(official(**file))
    for state in files:
        with pytest.raises(ValueError, match=f'file.pth: .*{message}'):
            load_into(MixedViT(**args), save(state))


def test_other_families(save):
    with pytest.raises(ValueError, match='does not fit STViTRSwin; it was read as dinov2'):
        load_into(STViTRSwin('tiny'), save(official()))
    with pytest.raises(ValueError, match=r'pos_embed \(1, 1370, 48\) instead of \(1, 17, 32\)'):
        load_into(MixedViT(), save({**official(), 'pos_embed': torch.zeros(1, 1370, 48)}))


@pytest.mark.parametrize('layout', ['official', 'timm', 'mmpretrain'])
def test_giant_is_refused(layout, save):
    if layout == 'official':
        state = {
            name.replace('mlp.fc1', 'mlp.w12').replace('mlp.fc2', 'mlp.w3'): tensor
            for name, tensor in official().items()
        }
    elif layout == 'timm':
        state = timm_vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU).state_dict()
    else:
        args = dict(layer_scale_init_value=1e-5, layer_cfgs=dict(ffn_type='swiglu_fused'))
        state = MMPretrainViT(ARCH, 56, 14, **args).state_dict()
    assert detect_source(state) == 'dinov2'
    with pytest.raises(ValueError, match='blocks have a SwiGLU, those of MixedViT a plain MLP'):
        load_into(MixedViT(), save(state))
