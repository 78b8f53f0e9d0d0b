"""Models without LayerScale compute the same from weights that have it."""

import copy

import pytest
import torch
from mmpretrain.models.backbones import DeiT3
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer as TimmViT

from mmtoken.backbones import DGEDeiT, MergeViT, MSViT, STViTDeiT, SWATDeiT
from mmtoken.checkpoints import Report, fit_to, load_into
from mmtoken.checkpoints.layer_scale import fold_scales
from mmtoken.layers.common.vit import ViTBlock
from mmtoken.necks import SemanticRecoveryNeck
from mmtoken.runtime.reference import reference_path

DEPTH, SIDE = 4, 56
ARCH = dict(embed_dims=32, num_layers=DEPTH, num_heads=2, feedforward_channels=64)
SIZES = dict(img_size=SIDE, patch_size=14)
SCALED = dict(ls1='attn.proj', ls2='mlp.fc2')
NAMES = {f'blocks.{i}.{scale}.gamma' for i in range(DEPTH) for scale in SCALED}
MODELS = {
    'DGE': lambda **kwargs: DGEDeiT(ARCH, **SIZES, **kwargs),
    'dense DGE': lambda **kwargs: DGEDeiT(ARCH, (1,), budget=None, **SIZES, **kwargs),
    'STViT': lambda **kwargs: STViTDeiT(ARCH, semantic_size=2, base_layers=1, **SIZES, **kwargs),
    'dense STViT': lambda **kwargs: STViTDeiT(ARCH, semantic_size=None, **SIZES, **kwargs),
    'SWAT': lambda **kwargs: SWATDeiT(
        dict(ARCH, patch_size=14, mlp_kernel=3), plane_size=1, img_size=SIDE, **kwargs
    ),
    'SWAT, planes': lambda **kwargs: SWATDeiT(
        dict(ARCH, patch_size=16, mlp_kernel=5), plane_size=4, img_size=64, **kwargs
    ),
    'dense SWAT': lambda **kwargs: SWATDeiT(
        dict(ARCH, patch_size=14, mlp_kernel=3), structured=False, img_size=SIDE, **kwargs
    ),
    'MPM': lambda **kwargs: MergeViT(ARCH, merge_blocks=(1,), **SIZES, **kwargs),
    'MSViT': lambda **kwargs: MSViT(ARCH, 28, 14, img_size=SIDE, **kwargs),
}
# Of ViTBlock, so that LayerScale can be put into it. DGE's blocks have no place for it.
WITH_VIT_BLOCKS = sorted(set(MODELS) - {'DGE'})


def dinov2(grid=4):
    """Random weights as large as trained ones, by the names of the released files."""
    theirs = TimmViT(
        SIDE, 14, embed_dim=32, depth=DEPTH, num_heads=2, mlp_ratio=2, init_values=1.0,
        num_classes=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = theirs.state_dict() | dict(pos_embed=torch.empty(1, 1 + grid**2, 32))
    for name, tensor in state.items():
        std = 1.5 * tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.3
        state[name] = torch.empty_like(tensor).normal_(0, std, generator=generator)
        if name.endswith('gamma'):
            state[name].uniform_(-0.5, 1.5, generator=generator)
        elif 'norm' in name and name.endswith('weight'):
            state[name] += 1
    return state | dict(mask_token=torch.zeros(1, 32))


def fold_by_hand(state):
    """A file without LayerScale."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith('.gamma')}
    for i in range(DEPTH):
        for scale, layer in SCALED.items():
            gamma, layer = state[f'blocks.{i}.{scale}.gamma'], f'blocks.{i}.{layer}'
            for row, factor in enumerate(gamma):
                folded[f'{layer}.weight'] = folded[f'{layer}.weight'].clone()
                folded[f'{layer}.weight'][row] *= factor
            folded[f'{layer}.bias'] = folded[f'{layer}.bias'] * gamma
    return folded


def image(side=SIDE):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('way', ['load_into', 'load_state_dict'])
@pytest.mark.parametrize('name', MODELS)
def test_as_folded_by_hand(name, way, save):
    state = dinov2(grid=5)
    scaled, folded = MODELS[name](), MODELS[name]()
    scaled.load_state_dict(folded.state_dict())  # which makes fresh parts the same
    load_into(folded, save(fold_by_hand(state)))
    if way == 'load_into':
        report = load_into(scaled, save(state))
        assert report.origin == 'dinov2 (official names)'
        assert set(report.folded_scales) == NAMES
        assert '8 folded scales (blocks.*.ls*.gamma x 8)' in report.summary()
    else:
        assert scaled.load_state_dict(state, strict=False).unexpected_keys == []
    actual, expected = scaled.state_dict(), folded.state_dict()
    assert actual.keys() == expected.keys()
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert different == [] and tuple(scaled.pos_grid) == (5, 5)


@pytest.mark.parametrize('name', WITH_VIT_BLOCKS)
def test_computes_as_with_layer_scale(name, save):
    """The same network with LayerScale, which takes it from the file as it is."""
    folded = MODELS[name]().eval()
    scaled = copy.deepcopy(folded)
    for block in scaled.blocks:
        assert isinstance(block, ViTBlock)
        block.ls1, block.ls2 = LayerScale(32), LayerScale(32)
    file = save(dinov2())
    report = load_into(scaled, file)
    assert report.folded_scales == [] and not NAMES & set(report.newly_initialized)
    load_into(folded, file)
    with torch.no_grad(), reference_path():  # others leave out LayerScale where it cannot be
        for actual, expected in zip(folded(image()), scaled(image()), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('grid', [4, 5])
def test_twins_of_two_methods_give_the_same_maps(grid, save):
    args = dict(img_size=SIDE, cls_token=True, out_indices=range(DEPTH))
    twin = DGEDeiT(ARCH, (1,), patch_size=14, budget=None, **args).eval()
    scaled = MSViT(ARCH, 28, 14, gate=None, layer_scale=1e-5, **args).eval()
    file = save(dinov2(grid))
    assert set(load_into(twin, file).folded_scales) == NAMES
    assert load_into(scaled, file).folded_scales == []
    with torch.no_grad():
        for actual, expected in zip(twin(image(84)), scaled(image(84)), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_deit_iii_of_mmpretrain(save):
    """By other names, and its class token has no position."""
    theirs = DeiT3(ARCH, img_size=SIDE, patch_size=14, out_type='featmap')
    theirs.eval()  # which returns nothing
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if 'gamma' in name:
                parameter.uniform_(-0.5, 1.5)
    ours = DGEDeiT(ARCH, (1,), budget=None, cls_token=True, **SIZES).eval()
    report = load_into(ours, save(theirs.state_dict()))
    assert report.origin == 'dinov2 (mmpretrain names)'
    scales = {'attn.gamma1.weight', 'ffn.gamma2.weight'}
    assert set(report.folded_scales) == {f'layers.{i}.{s}' for i in range(DEPTH) for s in scales}
    with torch.no_grad():
        torch.testing.assert_close(ours(image())[0], theirs(image())[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['MPM', 'MSViT'])
def test_model_with_layer_scale_needs_it(name, save):
    model = MODELS[name](layer_scale=1e-5)
    message = f'{type(model).__name__} has layer scale, it has none; set layer_scale=None'
    with pytest.raises(ValueError, match=message):
        load_into(model, save(fold_by_hand(dinov2())))


def test_blocks_that_are_not_built_are_not_folded(save):
    """With LayerScale in the others and without."""
    for kwargs in ({}, dict(layer_scale=1e-5)):
        report = load_into(MODELS['MPM'](out_indices=(1,), **kwargs), save(dinov2()))
        built = {name for name in NAMES if name.startswith(('blocks.0.', 'blocks.1.'))}
        assert set(report.folded_scales) == (set() if kwargs else built)
        assert NAMES - built <= set(report.dropped)


@pytest.mark.parametrize('recovery_scale', [None, 0.5])
def test_recovery_in_a_backbone_and_in_a_neck(recovery_scale, save):
    """Its LayerScale is not only in files of others."""
    layers = {
        'recover.3': lambda scale: MODELS['STViT'](recovery_scale=scale),
        'recover.0': lambda scale: SemanticRecoveryNeck(32, num_heads=2, recovery_scale=scale),
    }
    for name, make in layers.items():
        theirs, ours = make(0.5), make(recovery_scale)
        report = load_into(ours, save(theirs.state_dict()))
        scales = [] if recovery_scale else [f'{name}.{scale}.gamma' for scale in SCALED]
        assert report.folded_scales == scales
        halved = theirs.state_dict()[f'{name}.mlp.fc2.weight'] * (1 if recovery_scale else 0.5)
        assert torch.equal(ours.state_dict()[f'{name}.mlp.fc2.weight'], halved)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_products_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    gamma = torch.rand(32, generator=generator) + 0.5
    weight = (torch.rand(32, 64, generator=generator) + 0.1).to(dtype)
    bias = (torch.rand(32, generator=generator) + 0.1).to(dtype)
    state = {'0.mlp.fc2.weight': weight, '0.mlp.fc2.bias': bias, '0.ls2.gamma': gamma}
    own, report = dict.fromkeys(list(state)[:2]), Report(mapped={name: name for name in state})
    fold_scales(state, own, report)
    assert state.keys() == own.keys() == report.mapped.keys()
    gamma = gamma.double()
    exact = dict(weight=gamma[:, None] * weight.double(), bias=gamma * bias.double())
    for name in exact:
        folded = state[f'0.mlp.fc2.{name}']
        assert folded.dtype == dtype
        torch.testing.assert_close(
            folded.double(), exact[name], rtol=0.501 * torch.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize(
    'change, message',
    [
        ({'blocks.1.ls2.gamma': torch.ones(1)}, r'should not have: blocks\.1\.ls2\.gamma$'),
        (
            {'blocks.1.mlp.fc2.weight': None, 'blocks.1.mlp.fc2.bias': None},
            r'should not have: blocks\.1\.ls2\.gamma;',
        ),
        ({'blocks.1.mlp.fc2.weight': None}, r'lacks: blocks\.1\.mlp\.fc2\.weight'),
        ({'blocks.4.ls1.gamma': torch.ones(32)}, r'should not have: blocks\.4\.ls1\.gamma'),
    ],
)
def test_scale_without_its_layer_is_refused(change, message, save):
    state = {key: t for key, t in {**dinov2(), **change}.items() if t is not None}
    with pytest.raises(ValueError, match=f'file.pth: .*{message}'):
        load_into(MODELS['dense DGE'](), save(state))


def test_models_without_values_take_them_too():
    """As tools/convert_checkpoint.py builds them; the tensors given are not changed."""
    with torch.device('meta'):
        model = MODELS['SWAT']()
    given = dinov2()
    before = {name: tensor.clone() for name, tensor in given.items()}
    state, report = fit_to(model, given, 'a.pth')
    assert not any(tensor.is_meta for tensor in state.values())
    assert set(report.folded_scales) == NAMES
    assert given.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())
