"""The command line that converts checkpoints."""

import argparse
import csv
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from mmtoken.backbones import DGEDeiT, STViTRSwin
from mmtoken.checkpoints import load_into

ROOT = Path(__file__).parents[2]
TABLE = ROOT / 'tests' / 'data' / 'stvit_r_keys.tsv'
DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)


@pytest.fixture
def convert(run):
    """Run the tool; its exit status, output and errors."""
    return partial(run, 'convert_checkpoint')


@pytest.fixture
def swin(tmp_path):
    """A timm file of a narrow Swin."""
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=256, window_size=8, embed_dim=24, depths=DEPTHS, num_heads=HEADS, num_classes=3
    )
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(lr=1)), tmp_path / 'src')
    return tmp_path / 'src'


@pytest.fixture
def config(tmp_path):
    backbone = dict(
        type='mmtoken.STViTRSwin',
        arch=dict(embed_dims=24, depths=DEPTHS, num_heads=HEADS),
        stem='patch',
        init_cfg=dict(type='Pretrained', checkpoint='/nowhere'),
    )
    (tmp_path / 'config.py').write_text(f"model = dict(type='MaskRCNN', backbone={backbone!r})\n")
    return tmp_path / 'config.py'


def build():
    return STViTRSwin(dict(embed_dims=24, depths=DEPTHS, num_heads=HEADS), stem='patch')


@pytest.mark.parametrize('named', [True, False])
def test_renames(named, convert, swin, tmp_path):
    dst = tmp_path / 'new' / 'swin.pth'
    code, out, err = convert(swin, dst, *(['--source', 'swin'] if named else []))
    assert code == 0 and not err
    assert 'Read as swin (timm names)' in out and 'head.fc.weight' in out and str(dst) in out
    content = torch.load(dst, weights_only=True)
    assert set(content) == {'state_dict', 'meta'}
    meta = dict(content['meta'])
    assert meta.pop('mmtoken_version')
    assert meta == dict(source='swin', layout='timm', file='src')
    table = content['state_dict']['layers.0.blocks.0.attn.relative_position_bias_table']
    assert table.shape == (225, 3)
    assert list(dst.parent.iterdir()) == [dst]


def test_fits_to_a_config(convert, swin, config, tmp_path):
    """What is written loads as the source does."""
    code, out, err = convert(swin, tmp_path / 'swin.pth', '--config', config)
    assert code == 0 and not err
    for what in ('split', 'resized', '(225, 3) -> (169, 3)', 'newly', 'layer_scale_* x 10'):
        assert what in out
    content = torch.load(tmp_path / 'swin.pth', weights_only=True)['state_dict']
    from_source, from_file = build(), build()
    load_into(from_source, swin)
    torch.manual_seed(1)
    missing, unexpected = from_file.load_state_dict(content, strict=False)
    assert not unexpected and all('layer_scale' in n or n.startswith('norm') for n in missing)
    for name, tensor in content.items():
        assert torch.equal(from_source.state_dict()[name], tensor)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_layer_scale_is_folded_for_a_config(convert, tmp_path):
    """Only there is it known that the backbone has none."""
    arch = dict(embed_dims=24, num_layers=3, num_heads=2, feedforward_channels=96)
    backbone = dict(type='mmtoken.DGEDeiT', arch=arch, img_size=56, patch_size=14)
    (tmp_path / 'config.py').write_text(f'model = dict(backbone={backbone!r})\n')
    vit = timm.models.vision_transformer.VisionTransformer(
        56, 14, embed_dim=24, depth=3, num_heads=2, init_values=0.3
    )
    torch.save(vit.state_dict(), tmp_path / 'src.pth')
    paths = [tmp_path / name for name in ('src.pth', 'plain.pth', 'fitted.pth')]
    code, out, err = convert(*paths[:2])
    assert code == 0 and not err and 'folded scales' not in out
    code, out, err = convert(paths[0], paths[2], '--config', tmp_path / 'config.py')
    assert code == 0 and not err
    assert re.search(r'folded scales +6 +blocks\.\*\.ls\*\.gamma x 6', out)
    plain, fitted = (torch.load(path, weights_only=True)['state_dict'] for path in paths[1:])
    assert 'blocks.2.ls1.gamma' in plain and not any('gamma' in name for name in fitted)
    models = [DGEDeiT(arch, img_size=56, patch_size=14) for _ in paths]
    for path, model in zip(paths, models, strict=True):
        load_into(model, path)
    for name in fitted:
        assert all(torch.equal(model.state_dict()[name], fitted[name]) for model in models)


def test_released_detector(convert, tmp_path):
    weights = {'neck.conv.weight': torch.zeros(1)}
    with TABLE.open() as stream:
        for row in csv.DictReader(stream, delimiter='\t'):
            if row['file'] != 'cls':
                shape = [int(n) for n in row['small'].split('x')] if row['small'] != '-' else []
                weights[f'backbone.{row["name"]}'] = torch.zeros(()).expand(shape)
    torch.save(dict(state_dict=weights, meta=argparse.Namespace()), tmp_path / 'det.pth')
    config = ROOT / 'configs/stvit_r/mask-rcnn_stvit-r-swin-s_fpn_8xb2-1x_coco.py'
    code, out, err = convert(tmp_path / 'det.pth', tmp_path / 'new.pth', '--config', config)
    assert code == 0 and not err
    assert 'Read as stvit-r (official names)' in out
    assert 'neck.conv.weight' in out and 'newly' not in out


def test_never_overwrites_unasked(convert, swin, tmp_path):
    dst = tmp_path / 'dst.pth'
    dst.write_text('precious')
    code, out, err = convert(swin, dst)
    assert (code, out) == (1, '') and dst.read_text() == 'precious'
    assert err == f'convert_checkpoint: {dst} exists; --force overwrites it\n'
    assert convert(swin, dst, '--force')[0] == 0
    assert torch.load(dst, weights_only=True)['meta']['source'] == 'swin'


def test_in_place(convert, swin):
    before = torch.load(swin, weights_only=False)['state_dict']
    assert convert(swin, swin, '--force')[0] == 0
    after = torch.load(swin, weights_only=True)['state_dict']
    assert torch.equal(after['norm.weight'], before['norm.weight'])


def test_failed_write_leaves_nothing(convert, swin, tmp_path, monkeypatch):
    def fail(content, path):
        Path(path).write_text('half')
        raise OSError('No space left on device')

    (tmp_path / 'out').mkdir()
    monkeypatch.setattr(torch, 'save', fail)
    code, _, err = convert(swin, tmp_path / 'out' / 'a.pth')
    assert code == 1 and 'No space left' in err
    assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize(
    'args, message',
    [
        (['missing.pth'], "No such file or directory: 'missing.pth'"),
        (['{other}'], 'its names are not those of stvit-r, swat, swin, vtpack, pvt, rotary-vit, '),
        (['{other}', '--source', 'vit'], "not the names of a 'vit' checkpoint"),
        (['{swin}', '--source', 'vit'], "they look like 'swin'"),
        (['{swin}', '--prefix', 'backbone'], '--prefix'),
        (['{swin}', '--source', 'swin', '--prefix', 'backbone'], "starts with prefix 'backbone.'"),
        (['{swin}', '--config', '{vit}'], 'does not fit STViTDeiT; it was read as swin'),
        (['{swin}', '--config', 'missing.py'], 'missing.py'),
        (['{swin}', '--config', '{foreign}'], 'has no backbone of ours'),
        (['{swin}', '--config', '{empty}'], 'has no backbone of ours'),
        (['{swin}', '--config', '{broken}'], 'broken.py gives no backbone'),
        (['{swin}', '--config', '{wrong}'], "gives no backbone: .*'huge'"),
    ],
)
def test_errors_are_told_without_a_traceback(args, message, convert, swin, tmp_path):
    torch.save(dict(weight=torch.zeros(1)), tmp_path / 'other.pth')
    configs = dict(
        vit="model = dict(backbone=dict(type='mmtoken.STViTDeiT', arch='tiny'))",
        foreign="model = dict(backbone=dict(type='ResNet'))",
        empty='x = 1',
        broken='model = dict(',
        wrong="model = dict(backbone=dict(type='mmtoken.STViTRSwin', arch='huge'))",
    )
    names = dict(swin=swin, other=tmp_path / 'other.pth')
    for name, text in configs.items():
        names[name] = tmp_path / f'{name}.py'
        names[name].write_text(text + '\n')
    src, *options = (arg.format(**names) for arg in args)
    code, out, err = convert(src, tmp_path / 'dst.pth', *options)
    assert code == 1 and not out and err.startswith('convert_checkpoint: ')
    assert re.search(message, err), err
    assert not (tmp_path / 'dst.pth').exists()


def test_help_teaches(convert):
    shown = convert('--help').stdout
    for part in ('--source', '--config', 'example:', 'swin_small_patch4_window7_224.pth'):
        assert part in shown


def test_as_a_command():
    tool = str(ROOT / 'tools' / 'convert_checkpoint.py')
    done = subprocess.run(
        [sys.executable, tool, 'none.pth', 'x.pth'], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr == "convert_checkpoint: [Errno 2] No such file or directory: 'none.pth'\n"


def test_whole_detectors_keep_their_heads(convert, swin, tmp_path):
    """What mmdet's or Microsoft's detector was trained to is there for ``load_from``."""
    weights = torch.load(swin, weights_only=False)['state_dict']
    state = {f'backbone.{name}': tensor for name, tensor in weights.items()}
    state['rpn_head.rpn_conv.weight'] = torch.randn(2, 2)
    torch.save(dict(state_dict=state), tmp_path / 'detector.pth')
    code, out, _ = convert(tmp_path / 'detector.pth', tmp_path / 'new.pth', '--whole')
    assert code == 0 and 'kept' in out
    new = torch.load(tmp_path / 'new.pth')['state_dict']
    assert torch.equal(new['rpn_head.rpn_conv.weight'], state['rpn_head.rpn_conv.weight'])
    assert torch.equal(
        new['backbone.layers.0.downsample.reduction.weight'],
        weights['layers.1.downsample.reduction.weight'],
    )
    code, _, err = convert(swin, tmp_path / 'other.pth', '--whole')
    assert code == 1 and 'contains only a backbone' in err
