"""Configs of ours as bases of others, and in MMEngine's hub."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.hub import get_config, get_model
from mmengine.registry import DefaultScope

import mmtoken  # noqa: F401 (lets `mmtoken::` resolve)
from mmtoken.backbones import DGEPVT, MSViT, STViTRSwin

DETECTOR = 'mmtoken::stvit_r/mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'
SEGMENTER = 'mmtoken::stvit_r/upernet_stvit-r-swin-t_8xb2-160k_ade20k-512x512.py'
# A library's own train.py, up to where the runner is made, or what it begins with.
TRAIN = """
import json, runpy, sys
from mmengine.config import Config
from mmengine.runner import Runner

def show(cfg):
    keys = sorted(k for k in cfg if k.startswith('key'))
    print(json.dumps([*keys, cfg.model.backbone.type, cfg.default_scope]))
    sys.exit()

assert 'mmtoken' not in sys.modules
Runner.from_cfg = show
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
READ = TRAIN.replace('from mmengine.runner import Runner', 'class Runner: pass').replace(
    "runpy.run_path(sys.argv[0], run_name='__main__')", "show(Config.fromfile('mine.py'))"
)


def read(bases, folder, library=None, lines=''):
    """What a process without mmtoken, a library's train.py if any, reads from such a config."""
    (folder / 'first.py').write_text('key_1 = 1\n')
    (folder / 'last.py').write_text('key_2 = 2\n')
    (folder / 'mine.py').write_text(f'_base_ = {bases}\n{lines}key_0 = 0\n')
    arguments = ['-c', READ]
    if library:
        tool = Path(find_spec(library).origin).parent / '.mim/tools/train.py'
        arguments = ['-c', TRAIN, tool, 'mine.py', '--work-dir', 'out']
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    'bases, keys',
    [
        (f'__import__("mmtoken") and "{DETECTOR}"', 1),
        (f'["first.py", "last.py", __import__("mmtoken") and "{DETECTOR}"]', 3),
        (f'["{DETECTOR}", "first.py", __import__("mmtoken") and "last.py"]', 3),
    ],
)
def test_configs_inherit_ours(bases, keys, tmp_path):
    expected = [*(f'key_{i}' for i in range(keys)), 'mmtoken.STViTRSwin', 'mmdet']
    assert read(bases, tmp_path) == expected


@pytest.mark.parametrize('library, ours', [('mmdet', DETECTOR), ('mmseg', SEGMENTER)])
def test_libraries_train_configs_that_inherit_ours(library, ours, tmp_path):
    bases = f'["first.py", __import__("mmtoken") and "{ours}", "last.py"]'
    expected = ['key_0', 'key_1', 'key_2', 'mmtoken.STViTRSwin', library]
    assert read(bases, tmp_path, library) == expected


def test_bases_of_mmseg_beside_a_backbone_of_ours(tmp_path):
    """MMEngine alone does not know under which name the onedl stack has mmseg installed."""
    files = ('models/fpn_r50.py', 'datasets/ade20k.py', 'default_runtime.py')
    bases = ', '.join(f'"mmseg::_base_/{file}"' for file in files)
    lines = (
        'custom_imports = dict(imports=["mmtoken"], allow_failed_imports=False)\n'
        'model = dict(pretrained=None, backbone=dict(_delete_=True, type="mmtoken.STViTRSwin"))\n'
    )
    bases = f'[__import__("mmtoken") and {bases}]'
    assert read(bases, tmp_path, lines=lines) == ['key_0', 'mmtoken.STViTRSwin', 'mmseg']


def scope_name():
    scope = DefaultScope.get_current_instance()
    return None if scope is None else scope.scope_name


@pytest.mark.parametrize(
    'path, scope, backbone',
    [
        (DETECTOR, 'mmdet', STViTRSwin),
        ('mmtoken::shapes/fpn_dge-pvt-nano_1xb16-300i_shapes-128x128.py', 'mmseg', DGEPVT),
        ('mmtoken::stvit_r/stvit-r-swin-tiny_16xb64_in1k.py', 'mmpretrain', STViTRSwin),
        ('mmtoken::msvit/mask-rcnn_msvit-s_sfp_8xb2-1x_coco.py', 'mmdet', MSViT),
    ],
)
def test_hub_builds_a_model(path, scope, backbone):
    scope_before = scope_name()
    assert get_config(path).default_scope == scope
    model = get_model(path)
    assert isinstance(model.backbone, backbone)
    for part in (model, model.data_preprocessor):
        assert type(part).__module__.startswith(f'{scope}.models.')
    assert scope_name() == scope_before
