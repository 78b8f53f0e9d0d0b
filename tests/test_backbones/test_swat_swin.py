import json
import re
from pathlib import Path

import pytest
import torch
from helpers import needs_tracing
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from mmtoken.analysis import count_macs
from mmtoken.backbones.swat_swin import SWATSwin
from mmtoken.layers.swat.structured import StructuredLinear, StructuredMlp
from mmtoken.runtime.reference import reference_path

DATA = Path(__file__).parent.parent / 'data'
SWIN = dict(embed_dims=32, depths=(2, 2, 3, 2), num_heads=(1, 2, 2, 4))


def classifier(arch):
    with torch.device('meta'):
        model = SWATSwin(arch, out_indices=(3,)).eval()
        return nn.ModuleList([model, nn.Linear(model.out_channels[-1], 1000)])


def wake(model):
    """Let every parameter matter."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 0.6)
    return model


def our_names(official):
    """Names and shapes of the release, which has 1 x 1 convolutions for Linear layers, as ours."""
    pairs = [
        (r'patch_embed\.proj2([12])', r'patch_embed.conv\1'),
        (r'patch_embed\.norm\.', r'patch_embed.norm_tokens.'),
        (r'patch_embed\.norm2', r'patch_embed.norm1'),
        (r'norm_tokens', r'norm2'),
        (r'attn\.(qkv|proj)_linear', r'attn.\1.linear'),
        (r'mlp\.fc3', r'mlp.dwconv'),
        (r'^norm\.', r'norm3.'),
    ]
    ours = {}
    for name, shape in official.items():
        layer, _, kind = name.rpartition('.')
        if f'{layer}_linear.{kind}' in official:
            name = f'{layer}.conv.{kind}'
        for old, new in pairs:
            name = re.sub(old, new, name)
        if re.search(r'mlp\.fc[12]\.weight', name):
            assert shape[2:] == [1, 1]
            shape = shape[:2]
        ours[name] = tuple(shape)
    return ours


def test_parameters_are_those_of_the_release():
    official = dict(json.loads((DATA / 'swat_swin_t_params.json').read_text()))
    for kind in ('weight', 'bias'):
        del official[f'head.{kind}']
    model, _ = classifier('tiny')
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == our_names(official)


@pytest.mark.parametrize(
    'arch, parameters, macs', [('tiny', 27.111, 4.680), ('small', 48.916, 9.118)]
)
def test_cost_is_that_of_the_release(arch, parameters, macs):
    """Millions and billions, of the classifier at 224 pixels."""
    model, head = both = classifier(arch)
    assert sum(p.numel() for p in both.parameters()) / 1e6 == pytest.approx(parameters, abs=5e-4)
    with reference_path():
        backbone = count_macs(model, torch.zeros(1, 3, 224, 224, device='meta'))
    assert (backbone + head.weight.numel()) / 1e9 == pytest.approx(macs, abs=5e-4)


def test_kinds_of_blocks():
    """Shifted blocks have plain attention, but for the last stage, where the release has none."""
    model, _ = classifier('tiny')
    structured = [
        [isinstance(block.attn.qkv, StructuredLinear) for block in stage.blocks]
        for stage in model.layers
    ]
    assert structured == [[True, False], [True, False], [True, False] * 3, [True, True]]
    for stage, side, kernel_size in zip(model.layers, (2, 4, 8, 16), (5, 5, 5, 3), strict=True):
        for j, block in enumerate(stage.blocks):
            assert block.shift == 3 * (j % 2)
            assert isinstance(block.mlp, StructuredMlp)
            assert block.mlp.dwconv.kernel_size == (kernel_size, kernel_size)
        assert stage.blocks[0].attn.qkv.side == side
    # At 224 pixels, where a window covers the last grid, as in the release.
    assert [model.layers[3].blocks[1].shift_on(grid) for grid in ((7, 7), (8, 8))] == [0, 3]


@pytest.mark.parametrize('structured', [True, False])
@pytest.mark.parametrize('size', [(224, 224), (330, 470)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_fast_path_equals_reference(structured, size, dtype):
    """Several strips in the early stages, odd grids in the later ones; kernels differ by dtype."""
    model = wake(SWATSwin(SWIN, structured).eval()).to(dtype)
    image = torch.randn(2, 3, *size, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    with torch.no_grad():
        fast = model(image)
        with reference_path():
            reference = model(image)
    for a, b in zip(fast, reference, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('size', [(128, 96), (75, 131)])
def test_gradients_equal_those_of_the_reference(size):
    model = wake(SWATSwin(SWIN, drop_path_rate=0.0).double().train())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weights = None

    def outcome():
        nonlocal weights
        maps = model(image)
        weights = weights or [torch.randn_like(m) for m in maps]
        loss = sum((m * w).sum() for m, w in zip(maps, weights, strict=True))
        return *maps, *torch.autograd.grad(loss, tuple(model.parameters()))

    training = outcome()
    with reference_path():
        reference = outcome()
    for a, b in zip(training, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_twin_equals_timm():
    arch = dict(embed_dims=32, depths=(2, 1, 2, 2), num_heads=(1, 2, 2, 4))
    theirs = SwinTransformer(
        224, embed_dim=32, depths=arch['depths'], num_heads=arch['num_heads'], num_classes=0
    ).eval()
    wake(theirs)
    ours = SWATSwin(arch, structured=False, out_indices=(3,)).eval()
    weights = {}
    for name, parameter in theirs.named_parameters():
        # Theirs merge at the start of a stage, ours at the end of the one before.
        name = re.sub(r'(\d)\.downsample', lambda m: f'{int(m[1]) - 1}.downsample', name)
        weights[re.sub(r'^norm\.', 'norm3.', name)] = parameter
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(image).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(image)[0], expected, atol=1e-4, rtol=1e-4)


def test_three_stages():
    arch = dict(embed_dims=16, depths=(1, 1, 2), num_heads=(1, 1, 2))
    model = SWATSwin(arch, out_indices=(1, 2)).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 100, 130))
    assert [m.shape for m in maps] == [(1, 32, 13, 17), (1, 64, 7, 9)]


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(arch={**SWIN, 'depths': (1, 1, 6)}), 'one number a stage'),
        (dict(arch=dict(embed_dims=64, depths=(1,) * 5, num_heads=(1,) * 5)), 'at most 4 stages'),
        (dict(arch={**SWIN, 'embed_dims': 48}), 'embed_dims=48 is no multiple of 32'),
        (dict(arch={**SWIN, 'num_heads': (1, 2, 3, 4)}), 'stage 2: .* no multiple of num_heads=3'),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        SWATSwin(**bad)


@needs_tracing
def test_compiles():
    arch = dict(embed_dims=8, depths=(1, 2), num_heads=(1, 1))
    model, image = wake(SWATSwin(arch, out_indices=(1,)).eval()), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager')(image)
        torch.testing.assert_close(compiled, model(image))
