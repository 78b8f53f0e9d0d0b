import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.e2e
def test_quick_demo(tmp_path):
    """All steps of the demo; scores after so few iterations mean nothing."""
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
