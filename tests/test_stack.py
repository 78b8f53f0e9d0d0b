import subprocess
import sys

import pytest

from mmtoken.stack import check_stack, find_problems, installed_version

UPSTREAM = {
    'mmengine': (0, 10, 7), 'mmcv': (2, 1, 0), 'mmdet': (3, 3, 0), 'mmsegmentation': (1, 2, 2),
    'mmpretrain': (1, 2, 0), 'torch': (2, 1, 2), 'numpy': (1, 26, 4), 'setuptools': (69,),
}  # fmt: skip
ONEDL = {
    'onedl-mmengine': (0, 10, 12), 'onedl-mmcv': (2, 3, 6), 'onedl-mmdetection': (3, 5, 1),
    'onedl-mmsegmentation': (1, 4, 2), 'torch': (2, 11, 0), 'numpy': (2, 2, 6),
    'setuptools': (83,),
}  # fmt: skip


@pytest.mark.parametrize('stack', [UPSTREAM, ONEDL, {}])
def test_working_stacks_pass(stack):
    assert find_problems(stack.get) == []


@pytest.mark.parametrize(
    'stack, change, words',
    [
        (ONEDL, {'mmdet': (3, 3, 0)}, ['both mmdet and onedl-mmdetection', 'pip uninstall']),
        (UPSTREAM, {'mmcv': (2, 2, 0)}, ['mmdet 3.3.0 refuses mmcv 2.2.0', 'mmcv==2.1.0']),
        (UPSTREAM, {'setuptools': (82, 0)}, ['pkg_resources', 'setuptools<82']),
        (UPSTREAM, {'numpy': (2, 0, 1)}, ['torch 2.1.2', 'numpy<2']),
    ],
)
def test_dead_combinations_are_named_with_a_mend(stack, change, words):
    problems = '\n'.join(find_problems({**stack, **change}.get))
    assert all(word in problems for word in words)


def test_check_stack_raises_one_error_and_can_be_skipped(monkeypatch):
    monkeypatch.setattr('mmtoken.stack.find_problems', lambda version_of: ['first', 'second'])
    with pytest.raises(ImportError, match='first\n.*second\n.*MMTOKEN_SKIP_STACK_CHECK=1'):
        check_stack()
    monkeypatch.setenv('MMTOKEN_SKIP_STACK_CHECK', '1')
    check_stack()


def test_installed_version():
    assert installed_version('no-such-distribution') is None
    assert installed_version('pytest') >= (7,)


def test_import_is_light_and_enables_config_paths():
    code = (
        'import mmtoken, sys; from mmengine.config.utils import MODULE2PACKAGE as m; '
        'print("torch" in sys.modules, "mmtoken.backbones" in sys.modules, m["mmtoken"])'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ['False', 'False', 'mmtoken']
