import pytest

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
def sparsify(run, tmp_path):
    config = tmp_path / 'vit.py'
    config.write_text(CONFIG)
    given = config, '--out-dir', tmp_path / 'out', '--shape', 64, 64
    return lambda *arguments: run('sparsify', *given, *arguments)


def test_what_changed_is_printed(sparsify, tmp_path):
    result = sparsify('--method', 'msvit', '--time')
    assert result.returncode == 0
    printed = ' '.join(result.stdout.split())
    assert 'G MACs ms' in printed and 'coarse ratio 0.5' in printed and 'dense' in printed
    assert printed.endswith(f'Wrote {tmp_path / "out" / "vit_msvit.py"}')


def test_training_free(sparsify):
    assert sparsify('--method', 'merge', '--training-free').returncode == 0
    result = sparsify('--method', 'dge', '--training-free')
    assert result.returncode == 1
    assert 'sparsify: dge must be trained; without training there is merge' in result.stderr


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--method', 'stvit-r'], 'stvit-r does not fit mmseg.VisionTransformer; stvit, dge'),
        (['--method', 'merge', 'none.pth'], 'none.pth'),
        (['--method', 'merge', '--finetune', '3'], 'has no train_cfg'),
    ],
)
def test_errors_are_one_line(sparsify, arguments, message):
    result = sparsify(*arguments)
    assert result.returncode == 1
    error = result.stderr
    assert error.startswith('sparsify: ') and message in error and error.count('\n') == 1


def test_schedules_have_a_length(sparsify):
    result = sparsify('--method', 'merge', '--finetune', '0')
    assert result.returncode == 2 and '--finetune must be 1 or more, got 0' in result.stderr
