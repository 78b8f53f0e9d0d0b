"""The command lines of tools/analysis: figures that agree with each other, help, errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ROOT / 'configs' / 'shapes'
DETECTOR = SHAPES / 'mask-rcnn_stvit-r-swin-nano_fpn_1xb8-7e_shapes.py'
SEGMENTER = SHAPES / 'upernet_stvit-r-swin-nano_1xb16-750i_shapes-128x128.py'


def run(tool, *args):
    command = [sys.executable, ROOT / 'tools' / 'analysis' / f'{tool}.py', *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def run_json(tool, tmp_path, *args):
    file = tmp_path / 'out' / 'results.json'
    result = run(tool, *args, '--json', file)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text()), result.stdout


def test_flops(tmp_path):
    results, out = run_json('flops', tmp_path, DETECTOR)
    assert results['shape'] == [160, 224] and '160 x 224' in out
    for side in (results['sparse'], results['dense']):
        assert side['macs'] == sum(side['kinds'].values())
        assert side['macs'] == sum(sum(kinds.values()) for kinds in side['stages'].values())
        assert side['executed_extra'] == side['executed'] - side['macs']
        assert f'{side["parameters"] / 1e6:.2f} M params' in out
    assert results['mac_ratio'] == results['dense']['macs'] / results['sparse']['macs'] > 1
    assert list(results['sparse']['stages'])[0] == 'patch_embed'
    assert max(map(len, out.splitlines())) <= 80


def test_benchmark(tmp_path):
    args = (SEGMENTER, '--rounds', 2, '--shape', 64, 64, '--against', DETECTOR)
    results, out = run_json('benchmark', tmp_path, *args)
    assert results['mac_ratio'] == results['macs_dense'] / results['macs_sparse']
    assert results['realised'] == pytest.approx(results['speedup'] / results['mac_ratio'])
    executed = results['executed']
    assert results['executed_ratio'] == executed['dense'] / executed['sparse']
    times = results['round_ms']
    assert list(times) == ['sparse', 'dense', 'peer', DETECTOR.stem]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())
    for over, key in (('dense', 'speedup'), ('peer', 'speedup_vs_peer')):
        ratio = sum(a / b for a, b in zip(times[over], times['sparse'], strict=True)) / 2
        assert results[key] == pytest.approx(ratio)  # the median of two
    assert results['sparse_ms'] == pytest.approx(sum(times['sparse']) / 2)
    assert results['dense_ms'] > 0 and results['peer_ms'] > 0
    assert results['peer'] == 'mmdet.SwinTransformer'
    assert set(results['against']) == {DETECTOR.stem}
    assert results['peak_mb_sparse'] > 0 and results['peak_mb_dense'] > 0
    assert (results['threads'], results['dtype'], results['shape']) == (1, 'float32', [64, 64])
    environment = results['environment']
    assert environment['torch'] == torch.__version__ and 'mmdet' in environment
    assert re.fullmatch(r'\d+\.\d+\.\d+', environment['mmtoken'])
    assert 'realised' in out and 'dense twin' in out and 'SwinTransformer' in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    'tool, words',
    [
        ('flops', ['examples:', '--shape H W', 'default: backbone', 'executed']),
        ('benchmark', ['examples:', '--against', 'default: float32', 'realised', '--train']),
    ],
)
def test_help_teaches(tool, words):
    result = run(tool, '--help')
    assert result.returncode == 0
    assert all(word in result.stdout for word in words)


def test_errors_are_one_line(tmp_path):
    config = tmp_path / 'config.py'
    result = run('flops', config)
    assert result.returncode == 1 and result.stderr == f'flops: no config file {config}\n'
    config.write_text("default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet'))\n")
    result = run('benchmark', config)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert "only 'ResNet'; known are" in result.stderr and 'mmtoken.STViTRSwin' in result.stderr


def test_shapes_are_positive():
    result = run('flops', DETECTOR, '--shape', 0, 64)
    assert result.returncode == 2 and 'must be 1 or more, got 0' in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    result = run('benchmark', DETECTOR, '--device', 'cuda')
    assert result.returncode == 1
    assert result.stderr == (
        'benchmark: --device cuda: torch sees no CUDA device here; use --device cpu\n'
    )


def test_summary_is_of_medians_over_runs(tmp_path):
    setting = dict(
        config='mask-rcnn_nano_fpn.py', part='backbone', shape=[64, 96], batch_size=2,
        device='cpu', dtype='float32', threads=1, train=False, compile=False,
    )  # fmt: skip
    figures = dict(
        dense_ms=300.0, speedup=1.5, mac_ratio=1.4, executed_ratio=1.6, speedup_vs_peer=None,
        peak_mb_sparse=10.0, peak_mb_dense=20.0,
    )  # fmt: skip
    for i, sparse_ms in enumerate((100.0, 900.0, 200.0)):
        (tmp_path / f'{i}.json').write_text(
            json.dumps(setting | figures | dict(sparse_ms=sparse_ms))
        )
    (tmp_path / '3.json').write_text(
        json.dumps(setting | figures | dict(sparse_ms=7.0, train=True))
    )
    result = run('summary', *sorted(tmp_path.glob('*.json')))
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(' nano')]
    assert [row[-1] for row in rows] == ['3', '1']
    assert '200' in rows[0] and '1.50' in rows[0]


def test_summary_refuses_other_files(tmp_path):
    (tmp_path / 'a.json').write_text('{"config": 1}')
    result = run('summary', tmp_path / 'a.json')
    assert result.returncode == 1 and 'no result of benchmark.py' in result.stderr
