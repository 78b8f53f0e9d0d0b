import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'misc' / 'sparsify.py'
CONFIG = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='VisionTransformer', img_size=(64, 64), embed_dims=32, num_layers=6, num_heads=2,
        mlp_ratio=2, out_indices=(5,), norm_cfg=dict(type='LN', eps=1e-6),
    ),
    decode_head=dict(type='FCNHead', in_channels=32, channels=16, num_classes=3),
)
"""


@pytest.fixture
def sparsify(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location('sparsify_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    config = tmp_path / 'vit.py'
    config.write_text(CONFIG)

    def run(*arguments):
        given = ['sparsify', str(config), '--out-dir', str(tmp_path / 'out'), *arguments]
        monkeypatch.setattr(sys, 'argv', [*given, '--shape', '64', '64'])
        return tool.main()

    return run


def test_what_changed_is_printed(sparsify, tmp_path, capsys):
    assert sparsify('--method', 'msvit', '--time') == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'G MACs ms' in printed and 'coarse ratio 0.5' in printed and 'dense' in printed
    assert printed.endswith(f'Wrote {tmp_path / "out" / "vit_msvit.py"}')


def test_training_free(sparsify, capsys):
    assert sparsify('--method', 'merge', '--training-free') == 0
    assert sparsify('--method', 'dge', '--training-free') == 1
    assert 'sparsify: dge must be trained; without training there is merge' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--method', 'stvit-r'], 'stvit-r does not fit mmseg.VisionTransformer; stvit, dge'),
        (['--method', 'merge', 'none.pth'], 'none.pth'),
        (['--method', 'merge', '--finetune', '3'], 'has no train_cfg'),
    ],
)
def test_errors_are_one_line(sparsify, arguments, message, capsys):
    assert sparsify(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith('sparsify: ') and message in error and error.count('\n') == 1


def test_schedules_have_a_length(sparsify, capsys):
    with pytest.raises(SystemExit):
        sparsify('--method', 'merge', '--finetune', '0')
    assert '--finetune must be 1 or more, got 0' in capsys.readouterr().err
