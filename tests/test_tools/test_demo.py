import json
import subprocess
import sys
from pathlib import Path

import demo
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EPOCH = (
    '11/21 03:34:12 - mmengine - INFO - Epoch(train) [10][50/75]  base_lr: 1.1e-04 lr: 1.1e-04  '
    'eta: 0:02:55  time: 1.0000  data_time: 0.0185  loss: 0.8768'
)
ITER = '... INFO - Iter(train) [225/900]  base_lr: 8.1e-04  eta: 0:05:55  time: 0.5299  loss: 1.3'


@pytest.mark.parametrize(
    'line, tool, fraction',
    [
        (EPOCH, 'train', (9 * 75 + 50) / (9 * 75 + 50 + 175)),
        (ITER, 'train', 0.25),
        ('... Epoch(test) [10/19]    eta: 0:00:05  time: 0.6  data_time: 0.0', 'test', 10 / 19),
        ('... Epoch(val) [12][19/19]    coco/bbox_mAP: 0.6610', 'train', None),
        ('... Saving checkpoint at 8 epochs', 'train', None),
    ],
)
def test_progress_is_read_from_the_log(line, tool, fraction):
    assert demo.fraction_done(line, tool) == pytest.approx(fraction)


@pytest.mark.e2e
def test_quick_demo(tmp_path):
    """The demo's whole path; scores after so few steps mean nothing."""
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'demo.py', '--quick', '--out', tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    detector, segmenter = json.loads((tmp_path / 'results.json').read_text())
    assert 0 <= detector['box AP'] <= 1 and 0 <= detector['mask AP'] <= 1
    assert 0 < segmenter['mIoU'] <= 1
    assert detector['parameters'] > 0 and detector['backbone_macs'] > 0
    assert (tmp_path / 'detections.png').stat().st_size > 10_000
    assert (tmp_path / 'segmentations.png').stat().st_size > 10_000
    assert 'mask AP' in result.stdout and 'segmentations.png' in result.stdout
