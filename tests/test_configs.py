"""Every config builds and trains, and reads as the README says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import smoke
import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = smoke.all_configs()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'dumped.py')
    dumped = Config.fromfile(tmp_path / 'dumped.py')
    assert dumped.to_dict() == cfg.to_dict()
    assert cfg.model.backbone.type.startswith('mmtoken.')
    assert cfg.auto_scale_lr.base_batch_size == base_batch_size(path.stem)
    assert cfg.train_dataloader.batch_size == images_per_gpu(path.stem)


def images_per_gpu(name):
    return int(batch_field(name).split('xb')[1])


def base_batch_size(name):
    gpus, images = batch_field(name).split('xb')
    return int(gpus) * int(images)


def batch_field(name):
    return next(part for part in name.replace('_', '-').split('-') if 'xb' in part)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_one_iteration(path):
    parameters, loss = smoke.run(path)
    assert parameters > 1e6 and loss > 0


@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if '-dense' in p.stem], ids=lambda path: path.stem
)
def test_twins_differ_in_the_backbone_alone(path):
    twin = Config.fromfile(path)
    sparse = Config.fromfile(path.with_name(path.name.replace('-dense', '')))
    assert twin.model.backbone.pop('semantic_size') is None
    assert twin.to_dict() == sparse.to_dict()


def test_user_config_inherits_ours(tmp_path):
    """As the README shows it, in a process that has not imported mmtoken."""
    (tmp_path / 'mine.py').write_text(
        "_base_ = __import__('mmtoken') and "
        "'mmtoken::stvit_r/mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'\n"
        'model = dict(backbone=dict(drop_path_rate=0.1))\n'
    )
    code = (
        'import json, sys; from mmengine.config import Config; '
        "b = Config.fromfile('mine.py').model.backbone; print(json.dumps(b.to_dict()))"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    backbone = json.loads(out.stdout.splitlines()[-1])
    assert backbone == dict(type='mmtoken.STViTRSwin', arch='tiny', drop_path_rate=0.1)


def test_model_index_lists_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    listed = []
    for metafile in index['Import']:
        models = yaml.safe_load((ROOT / metafile).read_text())['Models']
        assert all(set(m) >= {'Name', 'In Collection', 'Config'} for m in models)
        listed += [ROOT / m['Config'] for m in models]
    assert sorted(listed) == CONFIGS
