"""SWAT on DeiT: the released network, published sizes, any image."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmtoken.analysis import count_macs
from mmtoken.backbones.swat_deit import SWATDeiT
from mmtoken.runtime.reference import reference_path

DATA = Path(__file__).parents[1] / 'data'
ARCH = dict(
    embed_dims=32, num_layers=4, num_heads=4, feedforward_channels=48, patch_size=8, mlp_kernel=3
)
SMALL = dict(arch=ARCH, plane_size=4, img_size=80)
OFFICIAL = {
    'proj21': 'conv1',
    'proj22': 'conv2',
    'pos_embed2': 'plane_pos',
    'qkv_linear': 'qkv.linear',
    'proj_linear': 'proj.linear',
    'attn.qkv.': 'attn.qkv.conv.',
    'attn.proj.': 'attn.proj.conv.',
    'fc3': 'dwconv',
}


def released_weights():
    """Of DeiT-Ti, by our names; the formula is that of the golden data."""
    state = {}
    for name, shape in json.loads((DATA / 'swat_deit_ti_params.json').read_text()):
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        weight = 0.05 * torch.sin(0.1 * (index + 1) + 0.01 * (zlib.crc32(name.encode()) % 1000))
        if name.endswith('weight') and ('.norm' in name or name.startswith('norm')):
            weight += 1
        ours = name
        for theirs, new in OFFICIAL.items():
            if theirs in name:
                ours = name.replace(theirs, new)
                break
        weight = weight.view(shape)
        if 'mlp.fc' in ours and weight.ndim == 4:
            weight = weight.flatten(1)
        state[ours] = weight
    return state


@pytest.mark.parametrize('path', ['fast', 'reference'])
def test_equals_the_release(path):
    golden = {
        name: torch.from_numpy(array).double()
        for name, array in np.load(DATA / 'swat_deit_ti_full_golden.npz').items()
    }
    state = released_weights()
    weight, bias = state.pop('head.weight'), state.pop('head.bias')
    model = SWATDeiT('tiny', out_indices=(0, 5, 11)).double().eval()
    model.load_state_dict(state, strict=True)
    last = SWATDeiT('tiny', out_indices=(10, 11)).double().eval()
    last.load_state_dict(state, strict=True)
    last.norm = nn.Identity()
    pooled = SWATDeiT('tiny', out_type='avg_featmap').double().eval()
    pooled.load_state_dict(state, strict=True)
    c, i, j = (torch.arange(n, dtype=torch.float64) for n in (3, 224, 224))
    image = torch.sin(0.05 * i[:, None] + 0.03 * j + c[:, None, None])[None]

    def run():
        tokens = model.patch_embed(image)
        maps = (*model(image), last(image)[1])
        return tokens, maps, pooled(image)[0] @ weight.T + bias

    with torch.no_grad():
        if path == 'reference':
            with reference_path():
                tokens, maps, logits = run()
        else:
            tokens, maps, logits = run()
    # The golden blocks are rounded to float32.
    torch.testing.assert_close(tokens.flatten(1, 2), golden['patch_tokens'], atol=1e-6, rtol=1e-6)
    for name, map_ in zip(('block0', 'block5', 'normed', 'block11'), maps, strict=True):
        torch.testing.assert_close(map_.flatten(2).mT, golden[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits, golden['logits'], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    'arch, gmacs, params',
    [('tiny', 1.393, 5.828), ('small', 4.888, 22.265), ('base32', 4.515, 86.339)],
)
def test_cost(arch, gmacs, params):
    """Of the released networks, with a classifier of 1000 classes."""
    model = SWATDeiT(arch, out_type='avg_featmap').eval()
    head = nn.Linear(model.out_channels[0], 1000)
    numbers = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert numbers / 1e6 == pytest.approx(params, abs=0.0005)
    with reference_path():
        macs = count_macs(lambda x: head(model(x)[0]), torch.zeros(1, 3, 224, 224))
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.0006)


@pytest.mark.parametrize('size', [(80, 80), (64, 56), (41, 98), (3, 5)])
@pytest.mark.parametrize('training', [True, False])
def test_fast_path_is_the_reference(size, training):
    model = SWATDeiT(**SMALL, out_indices=(1, 3)).double().train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        maps = model(image)
        with reference_path():
            expected = model(image)
        for map_, other in zip(maps, expected, strict=True):
            assert map_.shape[2:] == tuple(-(-side // 8) for side in size)
            torch.testing.assert_close(map_, other, atol=1e-8, rtol=1e-8)
        if not training:
            return
        grads, wanted = (
            torch.autograd.grad(sum(m.square().mean() for m in outs), list(model.parameters()))
            for outs in (maps, expected)
        )
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize('size', [(80, 80), (64, 144), (97, 50)])
def test_twin_is_timms(size):
    theirs = VisionTransformer(
        80, 8, embed_dim=32, depth=4, num_heads=4, mlp_ratio=1.5, class_token=False, num_classes=0,
        global_pool='', dynamic_img_size=True, dynamic_img_pad=True,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    twin = SWATDeiT(**SMALL, structured=False, out_indices=(1, 3)).eval()
    twin.load_state_dict(theirs.state_dict(), strict=True)
    pooled = SWATDeiT(**SMALL, structured=False, out_type='avg_featmap').eval()
    pooled.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = twin(image)
        (first,) = theirs.forward_intermediates(image, (1,), norm=False, intermediates_only=True)
        last = theirs.forward_features(image)
        torch.testing.assert_close(maps[0], first, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(maps[1].flatten(2).mT, last, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled(image)[0], last.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_what_differs_from_the_twin():
    with torch.device('meta'):
        names = [set(SWATDeiT('small', s).state_dict()) for s in (True, False)]
    ours, twin = names
    assert {n for n in twin - ours if 'attn' not in n} == {
        'patch_embed.proj.weight',
        'patch_embed.proj.bias',
    }
    assert 'pos_embed' in ours & twin and 'cls_token' not in ours
    assert {n.rpartition('.')[0] for n in ours - twin if n.startswith('blocks.3.')} == {
        f'blocks.3.{layer}'
        for layer in (
            'attn.qkv.linear', 'attn.qkv.conv', 'attn.proj.linear', 'attn.proj.conv', 'mlp.dwconv',
        )
    }  # fmt: skip


def test_drop_path_rises_to_its_rate():
    for structured in (True, False):
        model = SWATDeiT(**SMALL, structured=structured, drop_path_rate=0.3)
        rates = [block.drop_path.drop_prob for block in model.blocks]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_positions_learn_at_other_sizes():
    model = SWATDeiT(**SMALL)
    model(torch.randn(1, 3, 100, 150))[0].square().sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0
    assert model.patch_embed.plane_pos.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(plane_size=0), 'at least 1, got 0'),
        (dict(plane_size=3), r'plane_size\*\*2 = 9, got 32'),
        (dict(plane_size=2, arch={**ARCH, 'patch_size': 6}), r'2 \* plane_size = 4, got 6'),
        (dict(arch={**ARCH, 'patch_size': 0}), 'got 0'),
        (dict(arch={**ARCH, 'mlp_kernel': 4}), 'odd and positive, got 4'),
        (dict(arch={**ARCH, 'num_heads': 5}), 'no multiple of num_heads=5'),
        (dict(out_type='cls_token'), "got 'cls_token'"),
        (dict(out_type='avg_featmap', out_indices=(1, 3)), r'last stage.*got \(1, 3\)'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        SWATDeiT(**{**SMALL, **bad})
