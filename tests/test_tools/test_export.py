import pytest
import torch

from mmtoken.export import OLDEST_TORCH

CONFIG = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(
        type='mmtoken.STViTDeiT', base_layers=1,
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64),
    ),
    decode_head=dict(
        type='FCNHead', in_channels=32, channels=16, num_classes=3, norm_cfg=dict(type='BN'),
    ),
    test_cfg=dict(mode='whole'),
)
"""


needs_exporters = pytest.mark.skipif(
    torch.__version__ < OLDEST_TORCH, reason=f'export needs torch {OLDEST_TORCH}'
)


@pytest.fixture
def export(run, tmp_path):
    def call(*arguments, text=CONFIG):
        config = tmp_path / 'config.py'
        config.write_text(text)
        return run('export', config, *arguments)

    return call


@needs_exporters
def test_a_segmentor(export, tmp_path):
    file = tmp_path / 'model.onnx'
    result = export('--format', 'onnx', '--part', 'model', '--out', file)
    assert result.returncode == 0
    assert '1 x 3 x 4 x 4' in result.stdout and 'PyTorch' in result.stdout and file.exists()
    result = export('--format', 'onnx', '--out', file)
    assert result.returncode == 1
    assert f'{file} exists; --force overwrites it' in result.stderr


@needs_exporters
def test_nothing_is_left_behind(export, tmp_path, monkeypatch):
    file = tmp_path / 'out' / 'maps.pt2'
    choosing = CONFIG.replace("'mmtoken.STViTDeiT', base_layers=1", "'mmtoken.MSViT'")
    several = ('--format', 'torch-export', '--out', file, '--batch-size', 2)
    result = export(*several, text=choosing)
    assert result.returncode == 1
    assert 'backbone (MSViT) chooses its tokens' in result.stderr
    result = export('--format', 'torch-export', '--out', file, '--tokens', 0.5)
    assert result.returncode == 1
    assert 'no part of EncoderDecoder chooses its tokens' in result.stderr
    monkeypatch.setattr('mmtoken.export.TOLERANCE', -1.0)
    result = export('--format', 'torch-export', '--out', file)
    assert result.returncode == 1
    assert 'differ from PyTorch' in result.stderr
    assert not file.exists()


def test_old_torch(export, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.1.2'))
    result = export('--format', 'onnx', '--out', tmp_path / 'model.onnx')
    assert result.returncode == 1
    assert result.stderr.endswith('export needs torch 2.6 or later, this is torch 2.1.2\n')
