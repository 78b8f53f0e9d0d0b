import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtoken.backbones import STViTRSwin

DATA = Path(__file__).parent.parent / 'data'
SWIN = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 2, 4))


@pytest.mark.parametrize('path', sorted(DATA.glob('stvit_det_*.npz')), ids=lambda path: path.stem)
def test_equals_the_released_model(path):
    golden = np.load(path)
    cfg = json.loads(str(golden['cfg_json']))
    model = STViTRSwin(
        dict(embed_dims=cfg['embed_dim'], depths=cfg['depths'], num_heads=cfg['num_heads']),
        mlp_ratio=cfg.get('mlp_ratio', 4.0),
        conv_pos=cfg['use_conv_pos'],
        window_size=cfg['window_size'],
        semantic_size=cfg['window_sample_size'],
        key_sizes=(
            cfg['k_window_size_1'], cfg['k_window_size_2'], cfg['restore_k_window_size'],
        ),
        pad_mask='released' if cfg['pad_mask'] else None,
    )  # fmt: skip
    weights = {
        name.removeprefix('sd/'): torch.from_numpy(golden[name])
        for name in golden.files
        if name.startswith('sd/')
    }
    keys = model.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith('num_batches_tracked') for k in keys.missing_keys)
    with torch.no_grad():
        maps = model.eval()(torch.from_numpy(golden['input']))
    for i, map_ in enumerate(maps):
        expected = torch.from_numpy(golden[f'out{i}'])
        torch.testing.assert_close(map_, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('arch, count', [('small', 48_857_862), ('base', 86_789_128)])
def test_parameters_as_released(arch, count):
    with torch.device('meta'):
        model = STViTRSwin(arch)
    assert sum(p.numel() for p in model.parameters()) == count


def test_tokens_are_saved():
    """What the method is for: fewer multiply-accumulates than the dense twin."""
    from mmtoken.analysis import count_macs

    image = torch.zeros(1, 3, 448, 672)
    sparse, dense = (
        count_macs(STViTRSwin('tiny', semantic_size=size).eval(), image) for size in (3, None)
    )
    assert sparse < 0.85 * dense


def test_exact_mask_ignores_what_lies_in_the_padding():
    """Poisoned padding must not change the maps; with the released mask it may."""
    from mmtoken.layers.semantic import NeighbourhoodBlock

    original = NeighbourhoodBlock.normed_with_padding

    def poisoned(self, x):
        tokens = original(self, x)
        return torch.cat([tokens[:, :-1], tokens[:, -1:] + 100], dim=1)

    image = torch.randn(1, 3, 150, 230)  # third stage: 10 x 15 tokens, windows of 7
    for pad_mask, equal in (('exact', True), ('released', False), (None, False)):
        torch.manual_seed(0)
        model = STViTRSwin(SWIN, pad_mask=pad_mask).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.2, 0.6)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            clean = model(image)[2]
            patch.setattr(NeighbourhoodBlock, 'normed_with_padding', poisoned)
            assert torch.allclose(model(image)[2], clean, atol=1e-5) == equal, pad_mask


def test_starts_from_a_classification_checkpoint(tmp_path):
    """As released: with a head and buffers of its own, without the norms of the maps."""
    source = STViTRSwin(SWIN).state_dict()
    weights = {k: v + 1 for k, v in source.items() if not k.startswith('norm')}
    extra = ['norm.weight', 'norm.bias', 'head.weight', 'head.bias', 'layers.0.blocks.1.attn_mask',
             'layers.0.blocks.0.attn.relative_position_index']  # fmt: skip
    content = dict(model={**weights, **dict.fromkeys(extra, torch.zeros(1))}, epoch=299)
    torch.save(content, tmp_path / 'cls.pth')
    model = STViTRSwin(SWIN, init_cfg=dict(type='Pretrained', checkpoint=tmp_path / 'cls.pth'))
    model.init_weights()
    for name, value in model.state_dict().items():
        expected = weights.get(name)
        assert torch.equal(value, expected) if expected is not None else name.startswith('norm')


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(arch={**SWIN, 'depths': (1, 1, 7, 1)}), 'multiple of 6'),
        (dict(arch={**SWIN, 'depths': (1, 6, 1)}), 'four stages'),
        (dict(arch={**SWIN, 'num_heads': (1, 2, 3, 4)}), 'no multiple of its 3 heads'),
        (dict(arch=SWIN, semantic_size=8), 'from 1 to window_size=7'),
        (dict(arch=SWIN, key_sizes=(14, 21)), 'three sides'),
        (dict(arch=SWIN, key_sizes=(14, 5, 27)), 'no smaller than'),
        (dict(arch=SWIN, pad_mask='exakt'), "'released', 'exact' or None"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        STViTRSwin(**bad)
