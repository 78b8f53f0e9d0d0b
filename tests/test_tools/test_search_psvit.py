"""The search for a layout, from training to the config, interrupted and gone on with."""

import json
import logging
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from mmtoken.analysis.layout_search import LayoutSpace

ROOT = Path(__file__).resolve().parent.parent.parent
SUPERNET = ROOT / 'configs' / 'shapes' / 'fpn_psvit-nano-supernet_1xb16-500i_shapes-128x128.py'
TINY = """\
_base_ = '{base}'
data_root = '{root}/ade/ADEChallengeData2016'
alone = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
train_dataloader = dict(batch_size=2, **alone)
val_dataloader = test_dataloader = alone
train_cfg = dict(max_iters=4)
default_hooks = dict(checkpoint=dict(interval=2))
stages = [(16, 2, (1, 1)), (16, 2, (2, 2)), (16, 2, (1, 1))]
model = dict(
    backbone=dict(arch=dict(stages=stages)), neck=dict(in_channels=[16] * 3, out_channels=16),
    decode_head=dict(in_channels=[16] * 3, channels=16),
)
"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'misc'))
    import search_psvit

    # What it silences for good
    monkeypatch.setattr(search_psvit, 'quieten', lambda: None)
    level = logging.getLogger('mmengine').level
    yield search_psvit
    logging.getLogger('mmengine').setLevel(level)


@pytest.fixture
def search(tool, monkeypatch, shapes_root, tmp_path):
    """A function from further arguments to the exit status."""
    config = tmp_path / 'tiny.py'
    config.write_text(TINY.format(base=SUPERNET, root=shapes_root))

    def run(*args):
        common = [config, '--work-dir', tmp_path / 'search', '--images', 2, '--population', 3]
        arguments = [*common, '--depth', 6, '--macs', 0.03, *args]
        monkeypatch.setattr(sys, 'argv', ['search_psvit.py', *map(str, arguments)])
        return tool.main()

    return run


@pytest.fixture
def counted(monkeypatch):
    """How many layouts were drawn, in training and for the first generation."""
    counts = []
    draw = LayoutSpace.draw

    def counting(space, rng):
        counts.append(draw(space, rng))
        return counts[-1]

    monkeypatch.setattr(LayoutSpace, 'draw', counting)
    return counts


def test_search(search, counted, monkeypatch, tmp_path, capsys):
    # Interrupted in the fourth iteration, after the checkpoint of the second.
    draw = LayoutSpace.draw

    def interrupted(space, rng):
        if len(counted) == 3:
            raise KeyboardInterrupt
        return draw(space, rng)

    with monkeypatch.context() as patch:
        patch.setattr(LayoutSpace, 'draw', interrupted)
        assert search('--generations', 2) == 1
    assert 'the same command goes on' in capsys.readouterr().err
    file = tmp_path / 'search' / 'search.json'
    assert json.loads(file.read_text())['checkpoint'] is None

    # The third and fourth iteration are drawn as they would have been.
    third, counted[:] = counted[2], []
    assert search('--generations', 2) == 0
    out = capsys.readouterr().out
    assert counted[0] == third
    kept = json.loads(file.read_text())
    assert kept['checkpoint'] == 'supernet/iter_4.pth' and kept['metric'] == 'mIoU'
    layouts = [tuple(map(tuple, row['layout'])) for row in kept['scores']]
    assert len(set(layouts)) == len(layouts) and 6 <= len(layouts) <= 8
    assert all(layout in LayoutSpace((2, 4, 2), 6) for layout in layouts)
    assert all(0 <= row['score'] <= 100 for row in kept['scores'])
    assert '6 layouts tried' in out and 'unshared [' in out and 'pairs [' in out

    # The config is that of the best one.
    written = tmp_path / 'search' / 'tiny_searched.py'
    best = max(range(6), key=lambda i: kept['scores'][i]['score'])
    check_config(written, layouts[best])
    assert f'{kept["scores"][best]["score"]:.2f}' in written.read_text()

    # Again: nothing is trained, scored or written.
    before = file.read_bytes(), written.stat().st_mtime_ns, runs(tmp_path)
    forbid_scoring(monkeypatch)
    assert search('--generations', 2) == 0
    assert before == (file.read_bytes(), written.stat().st_mtime_ns, runs(tmp_path))
    elsewhere = tmp_path / 'configs' / 'mine' / 'found.py'
    assert search('--generations', 2, '--out', elsewhere) == 0
    check_config(elsewhere, layouts[best])
    elsewhere.write_text('# mine\n')
    assert search('--generations', 2, '--out', elsewhere) == 1
    assert elsewhere.read_text() == '# mine\n'
    assert 'found.py exists' in capsys.readouterr().err

    # Other settings are refused.
    assert search('--generations', 2, '--images', 3, '--max-group', 2) == 1
    assert 'of another max-group and images' in capsys.readouterr().err
    assert file.read_bytes() == before[0]


def check_config(path, layout):
    cfg = Config.fromfile(path)
    assert tuple(groups for _, _, groups in cfg.model.backbone.arch.stages) == layout
    assert cfg.train_cfg.max_iters == 4 and cfg.model.backbone.sharing == 'auto'
    network = MODELS.build(cfg.model.backbone)
    assert tuple(stage.groups for stage in network.layers) == layout


def runs(tmp_path):
    return sorted((tmp_path / 'search' / 'supernet').iterdir())


def forbid_scoring(monkeypatch):
    import search_psvit

    def load(self):
        raise AssertionError('a layout is scored again')

    monkeypatch.setattr(search_psvit.Scorer, 'load', load)


def test_what_cannot_be_searched(search, tool, monkeypatch, tmp_path, capsys):
    assert search('--macs', 0.001) == 1
    assert 'no layout of 6 layers is within 0.001 G' in capsys.readouterr().err
    assert search('--depth', 9) == 1
    assert 'depth must be from 3 to 8' in capsys.readouterr().err
    (tmp_path / 'mine.py').write_text('# mine\n')
    assert search('--out', tmp_path / 'mine.py') == 1
    assert 'mine.py exists' in capsys.readouterr().err
    assert not (tmp_path / 'search').exists()
    other = ROOT / 'configs' / 'shapes' / 'fpn_pvt-nano_1xb16-500i_shapes-128x128.py'
    arguments = [other, '--macs', 1, '--work-dir', tmp_path / 'search']
    monkeypatch.setattr(sys, 'argv', ['search_psvit.py', *map(str, arguments)])
    assert tool.main() == 1
    assert 'must be a mmtoken.PSViT' in capsys.readouterr().err


@pytest.mark.parametrize(
    'scores, asked, expected',
    [
        (dict(aAcc=50.0, mIoU=12.5), None, 12.5),
        ({'coco/bbox_mAP': 0.25, 'coco/segm_mAP': 0.5}, None, 25),
        ({'coco/bbox_mAP': 0.25, 'coco/segm_mAP': 0.5}, 'coco/segm_mAP', 50),
        (dict(aAcc=50.0, mIoU=12.5), 'aAcc', 50),
        ({}, None, 0),  # of mmdet, without a detection
    ],
)
def test_the_score_is_one_of_the_evaluator(scores, asked, expected, tool, tmp_path):
    scorer = tool.Scorer(tool.Search(tmp_path / 'none.json', {}), None, 1, asked)
    assert scorer.read(scores) == expected


def test_unknown_metric(tool, tmp_path):
    scorer = tool.Scorer(tool.Search(tmp_path / 'none.json', {}), None, 1, 'mIou')
    with pytest.raises(ValueError, match="--metric must be one of aAcc, mIoU; got 'mIou'"):
        scorer.read(dict(aAcc=50.0, mIoU=12.5))


def test_config_over_an_architecture_of_the_zoo(tool, tmp_path):
    base = tmp_path / 'base.py'
    base.write_text(
        "model = dict(backbone=dict(type='mmtoken.PSViT', arch='tiny', sharing=None))\n"
    )
    layout = ((1,), (3, 2), (2, 1))
    out = tmp_path / 'sub' / 'out.py'
    tool.write_config(out, tool.make_config(base, 'tiny', layout, 'map', out, '# Found.'))
    backbone = Config.fromfile(out).model.backbone
    assert backbone.arch.stages == [(96, 2, (1,)), (192, 3, (3, 2)), (384, 6, (2, 1))]
    assert backbone.sharing == 'map'
