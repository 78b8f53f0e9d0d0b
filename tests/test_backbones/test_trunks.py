"""Trunks of later models compute what timm's own classes do, on random weights."""

import re
from functools import partial

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmtoken import dense_twin, routing_override
from mmtoken.backbones import DGEDeiT, MergeViT, MSViT, STViTDeiT
from mmtoken.checkpoints import detect_source, load_into
from mmtoken.layers.common.rotary import ROTARY as ROTARY_KINDS
from mmtoken.registry import MODELS
from mmtoken.runtime.decisions import record_tokens

IMAGES = torch.linspace(-2, 2, 2 * 3 * 72 * 96).sin().view(2, 3, 72, 96)
SIZES = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, patch_size=16, num_classes=0)
ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
DINOV3 = dict(
    mlp_ratio=2,
    init_values=0.1,
    rope_type='dinov3',
    rope_temperature=100,
    rope_rotate_half=True,
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    dynamic_img_size=True,
    num_reg_tokens=4,
    use_fc_norm=False,
    norm_layer=partial(nn.LayerNorm, eps=1e-5),
)
ROTARY = dict(rotary='dinov3', pos_embed=False, norm_eps=1e-5, num_registers=4)
EVA02 = dict(
    mlp_ratio=2,
    swiglu_mlp=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(16, 16),
    dynamic_img_size=True,
    use_fc_norm=False,
)
# timm's model, our arch, and our arguments
TRUNKS = {
    'DINOv3': (Eva, dict(DINOV3, qkv_bias=False), ROTARY, {}),
    'DINOv3 with biases': (Eva, dict(DINOV3, qkv_bias=True), ROTARY, dict(layer_scale=1.0)),
    'DINOv3 plus': (
        Eva,
        dict(DINOV3, qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8),
        dict(ROTARY, mlp='swiglu'),
        {},
    ),
    'EVA-02 small': (Eva, EVA02, dict(rotary='eva02', mlp='swiglu'), {}),
    'EVA-02 base': (
        Eva,
        dict(EVA02, qkv_fused=False, scale_mlp=True),
        dict(rotary='eva02', mlp='swiglu-norm'),
        {},
    ),
    'DINOv2 with registers': (
        VisionTransformer,
        dict(mlp_ratio=2, init_values=0.1, reg_tokens=4, no_embed_class=True),
        {},
        dict(num_registers=4),
    ),
    'DINOv2 giant': (
        VisionTransformer,
        dict(mlp_ratio=4, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1),
        dict(mlp='swiglu'),
        {},
    ),
    'SigLIP 2': (
        VisionTransformer,
        dict(mlp_ratio=2, class_token=False, global_pool='avg', fc_norm=False),
        {},
        dict(cls_token=False),
    ),
    'normalized queries and keys': (
        VisionTransformer,
        dict(mlp_ratio=2, qk_norm=True),
        dict(qk_norm=True),
        {},
    ),
}


TWINS = [
    partial(MSViT, gate=None),
    partial(MergeViT, merge_blocks=()),
    partial(DGEDeiT, granularities=(1,)),
    partial(STViTDeiT, semantic_size=None),
]


def randomize(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
        nn.init.normal_(parameter, scale, 0.2)
    return model.eval()


@pytest.fixture(params=TRUNKS)
def trunk(request, tmp_path):
    """timm's model, a file of its weights, and arguments of ours."""
    cls, theirs, arch, args = TRUNKS[request.param]
    model = randomize(cls(**SIZES, **theirs))
    file = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), file)
    args = dict(cls_token=True, arch=dict(ARCH, **arch), img_size=64) | args
    return model, file, args


def maps_of(model, images):
    """timm's last map, normalized."""
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    grid = [side // 16 for side in images.shape[-2:]]
    return tokens.transpose(1, 2).unflatten(2, grid)


@torch.no_grad()
@pytest.mark.parametrize('dense', TWINS)
def test_dense_twins_compute_what_timm_does(dense, trunk):
    theirs, file, args = trunk
    if dense.func is DGEDeiT:
        args = {name: value for name, value in args.items() if name != 'layer_scale'}
    ours = dense(**args).eval()
    load_into(ours, file)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], maps_of(theirs, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('sparse', [DGEDeiT, partial(STViTDeiT, base_layers=0)])
def test_blocks_with_queries_of_their_own_load_what_their_twins_do(sparse, trunk):
    """Projections of queries, and those of keys and values, which no file has like this."""
    _, file, args = trunk
    args = {name: value for name, value in args.items() if name != 'layer_scale'}
    sparse = sparse(**args)
    twin = MODELS.build(dense_twin(dict(args, type=f'mmtoken.{type(sparse).__name__}')))
    load_into(twin, file)
    report = load_into(sparse, file)
    own = (r'.*\.router\..*', r'blocks\.0\.pool\..*', r'blocks\.1\.centers', r'recover\..*')
    assert all(re.fullmatch('|'.join(own), name) for name in report.newly_initialized)
    parts = sparse.state_dict()
    for name, tensor in twin.blocks.state_dict().items():
        if '.qkv.' in name:
            names = [f'blocks.{name.replace("qkv", part)}' for part in ('q', 'kv')]
            assert torch.equal(torch.cat([parts[part] for part in names]), tensor)


@torch.no_grad()
@pytest.mark.parametrize('args', [{}, dict(layer_scale=0.5, num_registers=0, cls_token=False)])
def test_tiles_of_one_token_are_pooled_by_a_block_of_the_trunk(args, rotary, tmp_path):
    """Then semantic tokens are the image tokens, and prefix tokens are what they are in ViT."""
    args = dict(cls_token=True, num_registers=2) | args
    args['arch'] = dict(rotary['arch'], mlp='swiglu-norm', qk_norm=True, norm_eps=1e-5)
    dense = randomize(STViTDeiT(semantic_size=None, **args))
    sparse = STViTDeiT(semantic_size=1, base_layers=1, **args).eval()
    torch.save(dense.state_dict(), tmp_path / 'weights.pth')
    load_into(sparse, tmp_path / 'weights.pth')
    (tokens, layout), (pooled, places) = dense.reduce(IMAGES), sparse.reduce(IMAGES)
    for i in range(2):
        tokens, layout = dense.run_block(i, tokens, layout)
        pooled, places = sparse.run_block(i, pooled, places)
    torch.testing.assert_close(pooled, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(places.rotation.cos_sin, layout.rotation.cos_sin)


@torch.no_grad()
@pytest.mark.parametrize('size', [(96, 160), (32, 64)])
def test_rotary_positions_follow_the_grid_as_in_timm(size, tmp_path):
    theirs = randomize(Eva(**SIZES, **DINOV3))
    torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
    ours = MSViT(dict(ARCH, **ROTARY), gate=None, img_size=64).eval()
    load_into(ours, tmp_path / 'weights.pth')
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(ours(images)[0], maps_of(theirs, images), atol=1e-5, rtol=1e-5)


NOT_TURNED = torch.cat([torch.ones(8), torch.zeros(8)])  # cosines and sines of no angle


@pytest.fixture(params=ROTARY_KINDS)
def rotary(request):
    return dict(arch=dict(ARCH, num_layers=3, rotary=request.param, pos_embed=False))


@torch.no_grad()
@pytest.mark.parametrize('args', [{}, dict(cls_token=False, window_size=4)])
def test_fine_tokens_everywhere_are_the_dense_twin(args, rotary):
    sparse, dense = MSViT(**rotary, **args).eval(), MSViT(gate=None, **rotary, **args).eval()
    dense.load_state_dict(sparse.state_dict(), strict=False)  # but for the gate
    images = torch.randn(2, 3, 72, 104)
    with routing_override(coarse_ratio=0.0):
        torch.testing.assert_close(sparse(images), dense(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('mode', ['sparse', 'exact', 'dense'])
def test_queries_everywhere_are_the_dense_twin(mode, rotary, tmp_path):
    args = dict(rotary, cls_token=True)
    args['arch'] = dict(args['arch'], mlp='swiglu', qk_norm=True, num_registers=2)
    sparse = DGEDeiT(train_mode=mode, budget=None, **args)
    dense = DGEDeiT(granularities=(1,), **args)
    torch.save(dense.state_dict(), tmp_path / 'weights.pth')
    load_into(sparse, tmp_path / 'weights.pth')
    with routing_override(query_ratio=1.0):
        torch.testing.assert_close(sparse(IMAGES), dense(IMAGES), atol=1e-5, rtol=1e-5)
    with routing_override(query_ratio=0.4, seed=0):
        trained = sparse.train()(IMAGES)
    with routing_override(query_ratio=0.4, seed=0):
        torch.testing.assert_close(sparse.eval()(IMAGES), trained, atol=1e-5, rtol=1e-5)


def test_masked_and_gathered_tokens_are_turned_alike(rotary):
    maps = []
    for mode in ('masked', 'gathered'):
        torch.manual_seed(0)
        model = MSViT(train_mode=mode, gate=dict(loss=None), **rotary)
        for training in (True, False):
            with routing_override(coarse_ratio=0.5, seed=1):
                maps.append(model.train(training)(IMAGES)[0])
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_are_turned_by_the_mean_rotation_of_their_patches(rotary):
    """In a grid whose last row of regions is cut."""
    mixed, merged = MSViT(**rotary).eval(), MergeViT(merge_blocks=(0, 1), **rotary).eval()
    dense = mixed.rotation((5, 6), torch.device('cpu')).cos_sin[1:].view(5, 6, -1)
    with routing_override(coarse_ratio=0.5, seed=0):
        _, mixed_layout = mixed.reduce(IMAGES)
    tokens, layout = merged.reduce(IMAGES)
    for i in range(2):
        tokens, layout = merged.run_block(i, tokens, layout)
    for each in (mixed_layout, layout):
        owner = each.owner[:, 1:].unflatten(1, (5, 6))
        turns = each.rotation.cos_sin
        assert len(turns) < 2 * 31
        for token in range(len(turns)):
            image, *place = (owner == token).nonzero().T
            expected = dense[tuple(place)].mean(dim=0) if len(image) else NOT_TURNED
            torch.testing.assert_close(turns[token], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('pooling', ['attention', 'max', 'mean'])
def test_semantic_tokens_are_turned_by_the_mean_rotation_of_their_tiles(pooling, rotary):
    """In a grid whose tiles are cut on all sides."""
    model = STViTDeiT(base_layers=1, cls_token=True, pooling=pooling, **rotary).eval()
    with record_tokens() as records:
        tokens, layout = model.reduce(IMAGES)
        dense = layout.rotation.cos_sin[1:]
        for i in range(2):
            tokens, layout = model.run_block(i, tokens, layout)
    owner = records[0].owner[0].flatten()
    assert torch.equal(layout.image_rotation.cos_sin, dense)
    prefix, *turns = layout.rotation.cos_sin
    assert torch.equal(prefix, NOT_TURNED)
    assert len(turns) == len(owner.unique()) == tokens.shape[1] - 1
    for turn, group in zip(turns, owner.unique(), strict=True):
        expected = dense[owner == group].mean(dim=0)
        torch.testing.assert_close(turn, expected, atol=1e-5, rtol=1e-5)


def official(state):
    """Meta's names of DINOv3, with a mask of biases."""
    renames = [
        ('reg_token', 'storage_tokens'), ('.gamma_1', '.ls1.gamma'), ('.gamma_2', '.ls2.gamma'),
        ('fc1_g', 'w1'), ('fc1_x', 'w2'), *[('fc2', 'w3')] * any('fc1_g' in name for name in state),
    ]  # fmt: skip
    state = {replace_all(name, renames): tensor for name, tensor in state.items()}
    for i in range(SIZES['depth']):
        attn = f'blocks.{i}.attn.'
        query, value = (state.pop(f'{attn}{part}_bias') for part in 'qv')
        state[f'{attn}qkv.bias'] = torch.cat([query, torch.randn(32), value])
        state[f'{attn}qkv.bias_mask'] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
        state.pop(f'{attn}k_bias', None)
    return state | {'mask_token': torch.zeros(1, 32), 'rope_embed.periods': torch.ones(4)}


def transformers(state):
    """Hugging Face's names of DINOv3."""
    renames = [
        ('reg_token', 'embeddings.register_tokens'), ('cls_token', 'embeddings.cls_token'),
        ('patch_embed.proj', 'embeddings.patch_embeddings'), ('blocks.', 'layer.'),
        ('.gamma_1', '.layer_scale1.lambda1'), ('.gamma_2', '.layer_scale2.lambda1'),
        ('attn.proj', 'attention.o_proj'), ('mlp.fc1_g', 'mlp.gate_proj'),
        ('mlp.fc1_x', 'mlp.up_proj'), ('mlp.fc1', 'mlp.up_proj'), ('mlp.fc2', 'mlp.down_proj'),
    ]  # fmt: skip
    state = {replace_all(name, renames): tensor for name, tensor in state.items()}
    for i in range(SIZES['depth']):
        old, new = f'layer.{i}.attn.', f'layer.{i}.attention.'
        weights = zip('qkv', state.pop(f'{old}qkv.weight').chunk(3), strict=True)
        state |= {f'{new}{part}_proj.weight': weight for part, weight in weights}
        state |= {f'{new}{part}_proj.bias': state.pop(f'{old}{part}_bias') for part in 'qv'}
        state.pop(f'{old}k_bias', None)
    return state | {'embeddings.mask_token': torch.zeros(1, 1, 32)}


def replace_all(name, renames):
    for old, new in renames:
        name = name.replace(old, new)
    return name


@torch.no_grad()
@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('names', [official, transformers])
def test_dinov3_of_other_projects(names, gated, tmp_path):
    swiglu = dict(swiglu_mlp=True, swiglu_align_to=8) if gated else {}
    theirs = randomize(Eva(**SIZES, **dict(DINOV3, qkv_bias=True, **swiglu)))
    state = names(theirs.state_dict())
    assert detect_source(state) == 'rotary-vit'
    file = tmp_path / 'weights.pth'
    torch.save(state, file)
    arch = dict(ARCH, **ROTARY) | (dict(mlp='swiglu') if gated else {})
    ours = MSViT(arch, gate=None, img_size=64).eval()
    report = load_into(ours, file)
    assert not report.newly_initialized
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(ours(images)[0], maps_of(theirs, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('registers', [0, 4])
def test_dinov2_of_transformers(registers, tmp_path):
    kwargs = dict(mlp_ratio=2, init_values=0.1, reg_tokens=registers, no_embed_class=False)
    theirs = randomize(VisionTransformer(**SIZES, **kwargs))
    if registers:  # which have no position there
        theirs.pos_embed.data[:, 1 : 1 + registers] = 0
    state = theirs.state_dict()
    positions = state.pop('pos_embed')
    positions = torch.cat([positions[:, :1], positions[:, 1 + registers :]], dim=1)
    for i in range(SIZES['depth']):
        for kind in ('weight', 'bias'):
            parts = state.pop(f'blocks.{i}.attn.qkv.{kind}').chunk(3)
            for name, part in zip(('query', 'key', 'value'), parts, strict=True):
                state[f'blocks.{i}.attention.attention.{name}.{kind}'] = part
    renames = [
        ('blocks.', 'encoder.layer.'),
        ('attn.proj', 'attention.output.dense'), ('ls1.gamma', 'layer_scale1.lambda1'),
        ('ls2.gamma', 'layer_scale2.lambda1'), ('reg_token', 'embeddings.register_tokens'),
        ('cls_token', 'embeddings.cls_token'),
        ('patch_embed.proj', 'embeddings.patch_embeddings.projection'),
    ]  # fmt: skip
    state = {replace_all(name, renames): tensor for name, tensor in state.items()}
    state |= {f'layernorm.{kind}': state.pop(f'norm.{kind}') for kind in ('weight', 'bias')}
    state['embeddings.position_embeddings'] = positions
    assert detect_source(state) == 'dinov2'
    torch.save(state, tmp_path / 'weights.pth')
    ours = MSViT(ARCH, gate=None, img_size=64, num_registers=registers).eval()
    assert not load_into(ours, tmp_path / 'weights.pth').newly_initialized
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], maps_of(theirs, images), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_named(tmp_path):
    def refused(model, arguments, message):
        file = tmp_path / 'weights.pth'
        torch.save(model.state_dict(), file)
        with pytest.raises(ValueError, match=message):
            load_into(MSViT(**arguments), file)

    dinov3 = Eva(**SIZES, **DINOV3)
    refused(dinov3, dict(arch=ARCH), 'it has no learned positions; set arch=')
    few = dict(ARCH, **dict(ROTARY, num_registers=1))
    refused(dinov3, dict(arch=few), 'it has 4 register tokens, MSViT has 1; set num_registers=4')
    gated = dict(ARCH, **ROTARY, mlp='swiglu')
    refused(dinov3, dict(arch=gated), 'blocks have a plain MLP, those of MSViT a SwiGLU; set arch=')
    with pytest.raises(ValueError, match=r"arch\['rotary'\] must be one of .*dinov3.*got 'rope'"):
        MSViT(dict(ARCH, rotary='rope'))
    with pytest.raises(ValueError, match='a multiple of 4 channels in each head, got 12 channels'):
        MSViT(dict(ARCH, embed_dims=12, rotary='eva02'))
    with pytest.raises(ValueError, match=r'may have .*rotary.*got \['):
        MSViT(dict(ARCH, rope=True))


@torch.no_grad()
def test_half_precision(rotary):
    model = MSViT(**rotary).eval()
    with torch.autocast('cpu', torch.bfloat16):
        half = model(IMAGES)[0]
    torch.testing.assert_close(half.float(), model(IMAGES)[0], atol=0.1, rtol=0.1)
