"""Comparison over seeds, with a trainer that writes logs and does not train."""

import json
import sys

import pytest

FAKE_TRAINER = """\
import json, os, pathlib, sys
config, _, work_dir, _, seed, *options = sys.argv[1:]
seed = int(seed.removeprefix('randomness.seed='))
folder = pathlib.Path(work_dir) / '20260101_000000' / 'vis_data'
folder.mkdir(parents=True)
if 'broken' in config or options != ['a=1'] or os.environ['OMP_NUM_THREADS'] < '1':
    sys.exit('no data')
score = 0.3 + 0.01 * seed if 'dense' in config else 0.28 + 0.02 * seed
records = [dict(loss=2.0, iter=25), {'coco/bbox_mAP': 0.1}, {'coco/bbox_mAP': score, 'step': 7}]
(folder / 'scalars.json').write_text(''.join(json.dumps(record) + '\\n' for record in records))
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """A function from arguments to the exit status."""
    import compare as tool

    (tmp_path / 'train.py').write_text(FAKE_TRAINER)
    for name in ('net', 'net-dense', 'broken'):
        (tmp_path / f'{name}.py').touch()
    monkeypatch.setattr(tool, 'TRAINER', tmp_path / 'train.py')
    monkeypatch.setattr(tool, 'POLL_SECONDS', 0.01)

    def run(*args):
        common = ['--work-dir', tmp_path / 'runs', '--cfg-options', 'a=1']
        monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, [*args, *common])])
        return tool.main()

    return run


def test_differences_are_seed_by_seed(compare, tmp_path, capsys):
    file = tmp_path / 'out.json'
    pair = ('--pair', tmp_path / 'net.py', tmp_path / 'net-dense.py')
    assert compare(*pair, '--seeds', 0, 1, '--jobs', 2, '--json', file) == 0
    (result,) = json.loads(file.read_text())['pairs']
    box = result['metrics']['coco/bbox_mAP']
    assert result['seeds'] == [0, 1]
    assert box['sparse']['values'] == pytest.approx([28, 30])
    assert box['dense']['mean'] == pytest.approx(30.5)
    assert box['difference']['mean'] == pytest.approx(-1.5)
    assert box['difference']['std'] == pytest.approx(0.5**0.5)
    captured = capsys.readouterr()
    assert '-1.50 ± 0.71' in captured.out and 'bbox_mAP' in captured.out

    # What is finished is not repeated: only the new seed runs.
    assert compare(*pair, '--seeds', 0, 1, 2) == 0
    error = capsys.readouterr().err
    assert 'seed 2: bbox_mAP' in error and 'seed 0' not in error


def test_failures_are_told(compare, tmp_path, capsys):
    assert compare('--pair', tmp_path / 'net.py', tmp_path / 'broken.py', '--seeds', 3) == 1
    captured = capsys.readouterr()
    assert 'broken, seed 3 failed; see' in captured.err and 'no seed has finished' in captured.out
    assert 'no data' in (tmp_path / 'runs' / 'broken' / 'seed3' / 'output.log').read_text()
    assert compare('--pair', tmp_path / 'net.py', tmp_path / 'none.py') == 1
    assert 'no config file' in capsys.readouterr().err
