"""Plain ViT and DeiT of other libraries."""

import pytest
import torch
from mmpretrain.models.backbones import DistilledVisionTransformer
from mmpretrain.models.backbones import VisionTransformer as MMPretrainViT
from mmpretrain.models.necks import MAEPretrainDecoder
from mmpretrain.models.selfsup import MAEViT
from mmseg.models.backbones import VisionTransformer as MMSegViT
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer as TimmViT

from mmtoken.backbones import DGEDeiT, STViTDeiT, STViTRSwin, SWATDeiT
from mmtoken.checkpoints import convert, detect_source, load_into

ARCH = dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64)
TIMM = dict(img_size=64, embed_dim=32, depth=6, num_heads=2, mlp_ratio=2)


def timm_vit(**kwargs):
    return TimmViT(**{**TIMM, **kwargs}, num_classes=0)


def test_mmpretrain(wake, save):
    theirs = wake(MMPretrainViT(ARCH, img_size=64, out_type='raw'))
    assert detect_source(theirs.state_dict()) == 'vit'
    state = {f'backbone.{name}': tensor for name, tensor in theirs.state_dict().items()}
    ours = timm_vit().eval()
    report = load_into(ours, save(dict(state_dict={**state, 'head.fc.weight': torch.zeros(1)})))
    assert report.origin == 'vit (mmpretrain names)'
    assert report.newly_initialized == [] and report.dropped == ['head.fc.weight']
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.forward_features(image), theirs(image)[0], atol=1e-4, rtol=1e-4
        )


def test_mmseg(wake, save):
    theirs = wake(
        MMSegViT(
            img_size=64, embed_dims=32, num_layers=6, num_heads=2, mlp_ratio=2, out_indices=5,
            qkv_bias=True, patch_bias=True, final_norm=True, norm_cfg=dict(type='LN', eps=1e-6),
        )
    )  # fmt: skip
    ours = timm_vit().eval()
    report = load_into(ours, save(theirs.state_dict()))
    assert report.origin == 'vit (mmseg names)' and report.newly_initialized == []
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = ours.forward_features(image)[:, 1:]
        map_ = tokens.transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(map_, theirs(image)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('library', ['timm', 'mmpretrain'])
def test_distillation_token_leaves_the_sequence(library):
    if library == 'timm':
        state = VisionTransformerDistilled(**TIMM, num_classes=3).state_dict()
    else:
        state = DistilledVisionTransformer(ARCH, img_size=64).state_dict()
    assert detect_source(state) == 'deit'
    converted, report = convert(state, 'deit')
    position, full = converted['pos_embed'], state['pos_embed']
    assert torch.equal(position, torch.cat([full[:, :1], full[:, 2:]], dim=1))
    assert report.resized == dict(pos_embed=((1, 18, 32), (1, 17, 32)))
    assert set(converted) == set(timm_vit().state_dict())
    assert 'dist_token' in report.dropped and report.layout == library


def test_without_distillation_a_deit_is_a_vit():
    state = timm_vit().state_dict()
    assert detect_source(state) == 'vit'
    assert convert(state, 'deit')[0].keys() == convert(state, 'vit')[0].keys() == state.keys()


@pytest.mark.parametrize('kind', ['timm', 'distilled', 'mmpretrain'])
@pytest.mark.parametrize('semantic', [True, False])
@pytest.mark.parametrize('img_size', [64, (96, 160)])
def test_our_deit(kind, semantic, img_size, save, wake):
    """The position embedding loses its class tokens and keeps its grid."""
    theirs = dict(
        timm=lambda: TimmViT(**TIMM, num_classes=3),
        distilled=lambda: VisionTransformerDistilled(**TIMM, num_classes=3),
        mmpretrain=lambda: MMPretrainViT(ARCH, img_size=64),
    )[kind]()
    state = wake(theirs).state_dict()
    ours = STViTDeiT(
        ARCH, img_size=img_size, base_layers=2, out_indices=(5,),
        **({} if semantic else dict(semantic_size=None)),
    )  # fmt: skip
    report = load_into(ours, save(dict(model=state)))

    position = state['pos_embed'][:, -16:]
    assert torch.equal(ours.pos_embed, position) and ours.pos_grid == (4, 4)
    assert report.grids == ({} if img_size == 64 else dict(pos_embed=(4, 4)))
    old, new = state['pos_embed'].shape, ours.pos_embed.shape
    assert report.resized == ({} if old == new else dict(pos_embed=(tuple(old), tuple(new))))
    assert 'cls_token' in report.dropped
    assert len(report.split) == (4 if semantic else 0)
    assert all(
        n.startswith(('blocks.2.pool.', 'blocks.3.centers', 'recover.'))
        for n in report.newly_initialized
    )
    assert bool(report.newly_initialized) == semantic
    joint, at = convert(state, 'vit')[0], ours.blocks[3].attn
    for side in ('weight', 'bias'):
        expected = joint[f'blocks.3.attn.qkv.{side}']
        parts = [getattr(at.q, side), getattr(at.kv, side)] if semantic else [getattr(at.qkv, side)]
        assert torch.equal(torch.cat(parts), expected)


def test_dense_twin_computes_the_same(save, wake):
    theirs = wake(
        timm_vit(class_token=False, global_pool='avg', no_embed_class=True, fc_norm=False)
    )
    ours = STViTDeiT(ARCH, img_size=64, semantic_size=None).eval()
    assert load_into(ours, save(theirs.state_dict())).newly_initialized == []
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = ours(image)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, theirs.forward_features(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['timm', 'distilled', 'mmpretrain'])
@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('img_size', [64, (96, 160)])
def test_our_deit_of_dynamic_granularity(kind, cls_token, img_size, save):
    """Its routers are fresh; the class token stays where there is one, with its position."""
    theirs = dict(
        timm=lambda: TimmViT(**TIMM, num_classes=3),
        distilled=lambda: VisionTransformerDistilled(**TIMM, num_classes=3),
        mmpretrain=lambda: MMPretrainViT(ARCH, img_size=64),
    )[kind]()
    state = theirs.state_dict()
    ours = DGEDeiT(ARCH, img_size=img_size, cls_token=cls_token, budget=None)
    report = load_into(ours, save(dict(model=state)))
    position = state['pos_embed'][:, -16:]
    assert ours.pos_grid == (4, 4)
    if cls_token:
        position = torch.cat([state['pos_embed'][:, :1], position], dim=1)
        assert torch.equal(ours.cls_token, state['cls_token'])
    assert torch.equal(ours.pos_embed, position)
    assert ('cls_token' in report.dropped) != cls_token
    assert len(report.newly_initialized) == 12 and all(
        '.router.gate.' in name for name in report.newly_initialized
    )
    assert len(report.split) == 12


def test_dense_deit_computes_the_same(save, wake):
    theirs = wake(timm_vit())
    ours = DGEDeiT(ARCH, (1,), img_size=64, cls_token=True, out_type='cls_token').eval()
    assert load_into(ours, save(theirs.state_dict())).newly_initialized == []
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(image)[:, 0]
        torch.testing.assert_close(ours(image)[0], expected, atol=1e-4, rtol=1e-4)


def test_our_class_token_is_not_made_up(save):
    state = timm_vit(class_token=False, global_pool='avg').state_dict()
    with pytest.raises(ValueError, match='names it lacks: cls_token'):
        load_into(DGEDeiT(ARCH, img_size=64, cls_token=True), save(state))


def test_class_token_without_a_position_keeps_none(save):
    state = timm_vit(no_embed_class=True).state_dict()
    ours = DGEDeiT(ARCH, img_size=64, cls_token=True)
    load_into(ours, save(state))
    zero = torch.zeros(1, 1, 32)
    assert torch.equal(ours.pos_embed, torch.cat([zero, state['pos_embed']], dim=1))


def test_split_projections_are_known_again(save):
    """A converted file has neither routers nor joint projections."""
    image = dict(img_size=(32, 128))  # 2 x 8 tokens, as many as 4 x 4
    theirs, ours = DGEDeiT(ARCH, **image), DGEDeiT(ARCH, **image)
    state = {name: t for name, t in theirs.state_dict().items() if 'router' not in name}
    report = load_into(ours, save(state))
    assert report.origin == 'vit (mmtoken names)' and not report.resized
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in state.items())


def test_split_projections_are_joined(save):
    theirs, twin = DGEDeiT(ARCH, img_size=64), DGEDeiT(ARCH, (1,), img_size=64)
    state = {name: t for name, t in theirs.state_dict().items() if 'router' not in name}
    report = load_into(twin, save(state))
    assert not report.newly_initialized and 'joined' in report.summary()
    for kind in ('weight', 'bias'):
        parts = [state[f'blocks.0.attn.{name}.{kind}'] for name in ('q', 'kv')]
        assert torch.equal(twin.state_dict()[f'blocks.0.attn.qkv.{kind}'], torch.cat(parts))


def test_as_many_positions_as_with_a_class_token(save):
    """5 x 10 tokens are as many as 7 x 7 and one."""
    state = timm_vit(img_size=112).state_dict()
    ours = DGEDeiT(ARCH, img_size=(80, 160))
    load_into(ours, save(state))
    assert torch.equal(ours.pos_embed, state['pos_embed'][:, 1:]) and ours.pos_grid == (7, 7)


def test_larger_position_embedding_keeps_the_class_token(save):
    state, ours = timm_vit().state_dict(), timm_vit(img_size=(96, 128))
    load_into(ours, save(state))
    expected = resample_abs_pos_embed(state['pos_embed'], (6, 8), num_prefix_tokens=1)
    assert torch.equal(ours.pos_embed, expected)


def test_grid_that_is_not_square_is_refused(save):
    state = timm_vit(img_size=(64, 96)).state_dict()
    with pytest.raises(ValueError, match=r'pos_embed \(1, 25, 32\) instead of \(1, 16, 32\)'):
        load_into(STViTDeiT(ARCH, img_size=64, base_layers=2), save(state))


def test_own_grid_with_as_many_positions_as_a_square(save):
    ours = dict(arch=ARCH, img_size=(64, 256), base_layers=2, semantic_size=2)
    saved, loaded = STViTDeiT(**ours), STViTDeiT(**ours)
    assert load_into(loaded, save(saved.state_dict())).resized == {}
    for name in ('pos_embed', 'blocks.3.centers'):
        assert torch.equal(loaded.state_dict()[name], saved.state_dict()[name])
    square = timm_vit(img_size=128).state_dict()
    load_into(loaded, save(square))
    assert torch.equal(loaded.pos_embed, square['pos_embed'][:, 1:]) and loaded.pos_grid == (8, 8)


def test_class_token_without_a_position(save):
    """Only where nothing is resampled: 25 positions can also be a class token and 4 x 6."""
    state = timm_vit(no_embed_class=True).state_dict()
    ours = STViTDeiT(ARCH, img_size=64, base_layers=2)
    assert load_into(ours, save(state)).resized == {}
    assert torch.equal(ours.pos_embed, state['pos_embed'])
    with pytest.raises(ValueError, match=r'other shapes: pos_embed \(1, 16, 32\)'):
        load_into(STViTDeiT(ARCH, img_size=96, base_layers=2), save(state))


def test_learned_centers_keep_their_grid(save):
    small = STViTDeiT(ARCH, img_size=128, base_layers=2, semantic_size=2)
    large = STViTDeiT(ARCH, img_size=(192, 256), base_layers=2, semantic_size=2)
    report = load_into(large, save(small.state_dict()))
    assert torch.equal(large.blocks[3].centers, small.blocks[3].centers)
    assert report.source is None and not report.resized
    assert report.grids == {'pos_embed': (8, 8), 'blocks.3.centers': (4, 4)}
    image = torch.randn(1, 3, 100, 180)
    with torch.no_grad():
        expected = small.eval()(image)[0]
        assert torch.equal(large.eval()(image)[0], expected)


def test_registers_must_agree(save):
    file = save(timm_vit(reg_tokens=4).state_dict())
    with pytest.raises(ValueError, match='4 register tokens, STViTDeiT has 0; set num_registers=4'):
        load_into(STViTDeiT(ARCH, base_layers=0, img_size=64), file)
    swat = SWATDeiT(dict(ARCH, patch_size=16, mlp_kernel=3), plane_size=4, img_size=64)
    with pytest.raises(ValueError, match='SWATDeiT has 0; it takes no num_registers'):
        load_into(swat, file)


def with_decoder(state):
    """What an MAE has beside its encoder."""
    rest = (
        'mask_token', 'decoder_embed.weight', 'decoder_pos_embed', 'decoder_norm.weight',
        'decoder_blocks.0.norm1.weight', 'decoder_blocks.0.attn.qkv.weight', 'decoder_pred.bias',
    )  # fmt: skip
    return {**state, **{name: torch.zeros(1, 1, 8) for name in rest}}, set(rest)


@pytest.mark.parametrize('full', [True, False])
@pytest.mark.parametrize('cls_token', [True, False])
def test_mae(full, cls_token, save, wake):
    """As released for fine-tuning, and with the decoder that paints."""
    theirs = wake(timm_vit())
    weights = theirs.state_dict()
    state, decoder = with_decoder(weights) if full else (weights, set())
    assert detect_source(state) == 'vit'
    ours = DGEDeiT(ARCH, (1,), img_size=64, cls_token=cls_token)
    report = load_into(ours, save(dict(model=state)))
    assert report.origin == ('vit (timm names)' if full else "the module's own names")
    assert report.newly_initialized == []
    assert set(report.dropped) == decoder | (set() if cls_token else {'cls_token'})
    assert torch.equal(ours.pos_embed, weights['pos_embed'][:, 0 if cls_token else 1 :])
    assert convert(state, 'vit')[0].keys() == weights.keys()
    if cls_token:
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            tokens = ours.eval()(image)[0].flatten(2).transpose(1, 2)
            expected = theirs.forward_features(image)[:, 1:]
            torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_fine_tuned_mae(save):
    """It normalises the mean over tokens, so the norm of tokens is fresh."""
    state = TimmViT(**TIMM, global_pool='avg', num_classes=3).state_dict()
    assert 'fc_norm.weight' in state and 'norm.weight' not in state
    ours = STViTDeiT(ARCH, img_size=64, semantic_size=None)
    report = load_into(ours, save(dict(model=state)))
    assert report.newly_initialized == ['norm.weight', 'norm.bias']
    assert {'fc_norm.weight', 'head.weight'} <= set(report.dropped)
    del state['blocks.1.norm1.weight']
    with pytest.raises(ValueError, match=r'names it lacks: blocks\.1\.norm1\.weight$'):
        load_into(ours, save(dict(model=state)))


@pytest.mark.parametrize('stage', ['pre-trained', 'fine-tuned'])
def test_mae_of_mmpretrain(stage, save, wake):
    if stage == 'pre-trained':
        theirs = MAEViT(ARCH, img_size=64)
        theirs.init_weights()  # sine-cosine positions
        neck = MAEPretrainDecoder(16, 16, 3, 32, 16, 2, 2, 2).state_dict()
    else:
        theirs, neck = MMPretrainViT(ARCH, 64, out_type='avg_featmap', final_norm=False), {}
    state = theirs.state_dict()
    file = {f'backbone.{name}': tensor for name, tensor in state.items()}
    file.update({f'neck.{name}': tensor for name, tensor in neck.items()})
    ours = DGEDeiT(ARCH, (1,), img_size=64)
    report = load_into(ours, save(dict(state_dict=file)))
    assert report.origin == 'vit (mmpretrain names)'
    assert report.newly_initialized == ([] if neck else ['norm.weight', 'norm.bias'])
    assert torch.equal(ours.pos_embed, state['pos_embed'][:, 1:])
    if neck:
        assert state['pos_embed'].std() > 0.1 and 'neck.mask_token' in report.dropped


def test_patch_embedding_is_resampled(save):
    """An enlarged patch is embedded as before."""
    state = timm_vit(img_size=64, patch_size=8, embed_dim=32).state_dict()
    ours = DGEDeiT(ARCH, (1,), img_size=128)
    report = load_into(ours, save(state))
    weight = state['patch_embed.proj.weight']
    assert report.resized['patch_embed.proj.weight'] == ((32, 3, 8, 8), (32, 3, 16, 16))
    patch = torch.randn(1, 3, 8, 8)
    enlarged = torch.nn.functional.interpolate(patch, size=16, mode='bicubic', antialias=True)
    new = ours.patch_embed.proj.weight
    expected = torch.einsum('ncij,ocij->no', patch, weight)
    actual = torch.einsum('ncij,ocij->no', enlarged, new)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r'patch_embed\.proj\.weight \(32, 3, 8, 8\) instead of'):
        load_into(DGEDeiT(ARCH, img_size=128, in_channels=4), save(state))


@pytest.mark.parametrize('direction', ['vit to swin', 'swin to vit'])
def test_families_are_not_confused(direction, save):
    swin = STViTRSwin(
        dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4)),
        semantic_size=None,
        stem='patch',
    )
    vit = STViTDeiT(ARCH, img_size=64, base_layers=2)
    if direction == 'vit to swin':
        target, state, read_as = swin, timm_vit().state_dict(), 'vit'
    else:
        target, state, read_as = vit, swin.state_dict(), 'swin'
    with pytest.raises(
        ValueError, match=f'does not fit {type(target).__name__}; it was read as {read_as}'
    ):
        load_into(target, save(state))
