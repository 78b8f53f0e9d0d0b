import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path

import pytest

import mmtoken
from mmtoken.clashes import DISTRIBUTIONS
from mmtoken.stack import (
    check_stack,
    find_missing_opencv,
    find_missing_ops,
    find_problems,
    installed_version,
)

UPSTREAM = {
    'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0', 'torch': '2.1.2', 'timm': '1.0.31', 'numpy': '1.26.4',
    'setuptools': '69',
}  # fmt: skip
ONEDL = {
    'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2', 'onedl-mmpretrain': '1.3.6', 'torch': '2.11.0',
    'timm': '1.0.31', 'numpy': '2.2.6', 'setuptools': '83',
}  # fmt: skip
BARE = {'mmengine': '0.10.7', 'torch': '2.5.1', 'timm': '1.0.31'}


@pytest.mark.parametrize(
    'stack',
    [
        {},
        UPSTREAM,
        ONEDL,
        BARE,
        {'torch': '2.11.0', 'timm': '1.0.31', 'numpy': '2.2.6'},  # backbones alone
        {**BARE, 'mmcv-lite': '2.1.0', 'mmpretrain': '1.2.0'},  # needs no ops
        {**BARE, 'mmcv': '2.0.1', 'mmdet': '3.1.0', 'mmsegmentation': '1.1.2'},
        {**BARE, 'mmengine': None, 'mmengine-lite': '0.10.7'},
        {**UPSTREAM, 'mmengine': '0.8.3', 'mmcv': '2.0.0rc4', 'mmpretrain': None},
        {**UPSTREAM, 'mmengine': None, 'onedl-mmengine': '0.10.12', 'torch': '2.7.1'},
        {**UPSTREAM, 'torch': '2.1.0+cpu', 'mmcv': '2.1.0+pt2.1cpu'},
        {**UPSTREAM, 'torch': '2.1.0a0+32f93b1', 'setuptools': '81.0.0.post1'},
        {**UPSTREAM, 'torch': '2.3.0+cu121', 'numpy': '2.0.0'},
        {**UPSTREAM, 'torch': '2.5.1', 'mmcls': '0.25.0'},  # a harmless leftover
        {**UPSTREAM, 'transformers': '4.55.4', 'pycocotools': '2.0.11'},
        {**ONEDL, 'transformers': '4.57.6', 'pycocotools': '2.0.11'},
        {**UPSTREAM, 'mmcv': 'of-our-own', 'torch': 'main', 'numpy': ''},  # nothing is known
    ],
)
def test_working_stacks_pass(stack):
    assert find_problems(stack.get) == []


@pytest.mark.parametrize(
    'stack, change, words',
    [
        (ONEDL, {'mmdet': '3.3.0'}, ['both mmdet and onedl-mmdetection', 'pip uninstall']),
        (ONEDL, {'mmengine-lite': '0.10.7', 'torch': '2.5.1'}, ['both mmengine-lite and onedl']),
        (ONEDL, {'mmcv': '2.1.0'}, ['both mmcv and onedl-mmcv', '"onedl-mmcv"']),
        (UPSTREAM, {'onedl-mmcv': '2.3.6'}, ['both mmcv and onedl-mmcv', '"mmcv==2.1.0"']),
        # torch.load reads weights only
        (UPSTREAM, {'torch': '2.6.0'}, ['torch.load', '"torch<2.6"', 'onedl-mmengine']),
        (UPSTREAM, {'torch': '2.7.1+cu126'}, ['mmengine 0.10.7', 'torch 2.7.1+cu126']),
        (UPSTREAM, {'torch': '2.6.0a0+df5bbc0.nv24.12'}, ['torch.load']),
        (UPSTREAM, {'torch': '2.6.0rc1'}, ['torch.load']),
        (UPSTREAM, {'mmengine': '0.10.4', 'torch': '2.8.0'}, ['mmengine 0.10.4', 'torch<2.6']),
        (BARE, {'mmengine': None, 'mmengine-lite': '0.10.7', 'torch': '2.9.0'}, ['torch.load']),
        # no ops
        (UPSTREAM, {'mmcv': None, 'mmcv-lite': '2.1.0'}, ['mmcv-lite 2.1.0 lacks', '-y mmcv ']),
        (UPSTREAM, {'mmcv': None, 'mmcv-lite': '2.2.0'}, ['mmcv-lite 2.2.0', 'mmcv==2.1.0']),
        (UPSTREAM, {'mmcv-lite': '2.1.0'}, ['mmdet 3.3.0 imports ops', '--no-build-isolation']),
        (
            {'mmcv-lite': '2.1.0'},
            {'mmsegmentation': '1.2.2'},
            ['mmsegmentation 1.2.2 imports ops', '--no-binary mmcv'],
        ),
        (ONEDL, {'onedl-mmcv': None, 'mmcv-lite': '2.2.0'}, ['mmcv-lite', '"onedl-mmcv"']),
        # generations
        (UPSTREAM, {'mmcv': None, 'mmcv-full': '1.7.2'}, ['mmcv-full 1.7.2', 'mmcv==2.1.0']),
        (UPSTREAM, {'mmcv': '1.7.2'}, ['mmcv 1.7.2 is too old', 'mmcv==2.1.0']),
        (UPSTREAM, {'mmcv': '2.0.0rc1'}, ['mmcv 2.0.0rc1 is too old', '2.0.0rc4']),
        (UPSTREAM, {'mmengine': '0.7.4'}, ['mmengine 0.7.4 is too old', 'mmengine==0.10.7']),
        (UPSTREAM, {'mmdet': '2.28.2'}, ['mmdet 2.28.2 is too old', 'mmdet==3.3.0']),
        (UPSTREAM, {'mmsegmentation': '0.30.0'}, ['mmsegmentation 0.30.0', '==1.2.2']),
        (UPSTREAM, {'mmpretrain': '0.9'}, ['mmpretrain 0.9 is too old', '==1.2.0']),
        (UPSTREAM, {'mmpretrain': None, 'mmcls': '0.25.0'}, ['mmcls 0.25.0', 'mmpretrain==1.2.0']),
        (BARE, {'timm': '0.9.16'}, ['timm 0.9.16 is too old', 'timm>=1.0']),
        (BARE, {'torch': '2.0.1+cu118'}, ['torch 2.0.1+cu118 is too old', 'torch>=2.1']),
        # what the libraries allow
        (UPSTREAM, {'mmcv': '2.2.0'}, ['mmdet 3.3.0 refuses mmcv 2.2.0', 'mmcv==2.1.0']),
        (UPSTREAM, {'mmcv': '2.2.0+cu121'}, ['mmsegmentation 1.2.2 refuses mmcv 2.2.0+cu121']),
        (UPSTREAM, {'mmdet': '3.1.0'}, ['mmdet 3.1.0 refuses mmcv 2.1.0', 'mmcv==2.0.1']),
        (BARE, {'mmpretrain': '1.0.0', 'mmcv': '2.1.0'}, ['mmpretrain 1.0.0', 'mmcv==2.0.1']),
        # mixed families
        (UPSTREAM, {'mmcv': None, 'onedl-mmcv': '2.3.6'}, ['refuses onedl-mmcv', 'mmcv==2.1.0']),
        (ONEDL, {'onedl-mmcv': None, 'mmcv': '2.1.0'}, ['not with mmcv 2.1.0', '"onedl-mmcv"']),
        # others
        (UPSTREAM, {'setuptools': '82.0'}, ['pkg_resources', 'setuptools<82']),
        (UPSTREAM, {'numpy': '2.0.1'}, ['torch 2.1.2', 'numpy<2']),
        (UPSTREAM, {'torch': '2.2.2', 'numpy': '2.0.0rc1'}, ['numpy 2.0.0rc1', 'numpy<2']),
        (
            UPSTREAM,
            {'transformers': '4.56.0', 'pycocotools': '2.0.11'},
            ['mmpretrain 1.2.0 and mmdet cannot be imported', 'transformers<4.56'],
        ),
        (
            ONEDL,
            {'transformers': '5.0.0', 'pycocotools': '2.0.11'},
            ['onedl-mmpretrain 1.3.6', 'transformers<5'],
        ),
    ],
)
def test_problems_are_named_with_a_command(stack, change, words):
    problems = find_problems({**stack, **change}.get)
    assert all(word in '\n'.join(problems) for word in words), problems
    assert all(': pip ' in problem and '\n' not in problem for problem in problems)


def test_no_command_leads_to_the_next_problem():
    """Where both families' mmcv are there, the commands agree on the one to keep."""
    for stack in (UPSTREAM, ONEDL):
        problems = find_problems({**stack, 'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6'}.get)
        assert len({problem.rpartition('pip install')[2] for problem in problems}) == 1


def mmcv_in(folder, monkeypatch):
    spec = ModuleSpec('mmcv', None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr('mmtoken.stack.find_spec', lambda name: spec)


@pytest.mark.parametrize('stack', [UPSTREAM, ONEDL])
def test_mmcv_without_compiled_ops(stack, tmp_path, monkeypatch):
    mmcv_in(tmp_path, monkeypatch)
    (tmp_path / '_ext.cpython-27-other.so').touch()  # of a Python that was there before
    (problem,) = find_missing_ops(stack.get)
    assert str(tmp_path) in problem and 'none compiled for this Python' in problem
    assert '--no-build-isolation' in problem and 'mmcv' in problem

    (tmp_path / f'_ext{EXTENSION_SUFFIXES[0]}').touch()
    assert find_missing_ops(stack.get) == []


@pytest.mark.parametrize('stack', [{}, BARE, {'mmpretrain': '1.2.0', 'mmcv': '2.1.0'}])
def test_ops_are_not_asked_for_in_vain(stack, tmp_path, monkeypatch):
    mmcv_in(tmp_path, monkeypatch)
    assert find_missing_ops(stack.get) == []


@pytest.mark.parametrize(
    'installed, problems', [({'mmengine'}, 1), ({'mmengine', 'cv2'}, 0), (set(), 0)]
)
def test_opencv_is_asked_for(installed, problems, monkeypatch):
    monkeypatch.setattr('mmtoken.stack.find_spec', lambda name: name if name in installed else None)
    found = find_missing_opencv()
    assert len(found) == problems
    assert all('pip install opencv-python-headless' in problem for problem in found)


def test_check_stack_raises_one_error_and_can_be_skipped(monkeypatch):
    monkeypatch.setattr('mmtoken.stack.find_problems', lambda version_of: ['first', 'second'])
    with pytest.raises(ImportError, match='first\n.*second\n.*MMTOKEN_SKIP_STACK_CHECK=1'):
        check_stack()
    monkeypatch.setenv('MMTOKEN_SKIP_STACK_CHECK', '1')
    check_stack()


def test_installed_version():
    assert installed_version('no-such-distribution') is None
    assert installed_version('pytest') == pytest.__version__


def run_python(code, *folders):
    """Run code where these folders come first on the path."""
    path = os.pathsep.join([*map(str, folders), os.environ.get('PYTHONPATH', '')])
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )


def test_import_refuses_an_mmcv_without_ops(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('raise RuntimeError("mmcv was imported")\n')
    if PathFinder.find_spec('mmdet') is None:
        pytest.skip('no library that needs ops is installed')
    err = run_python('import mmtoken', tmp_path).stderr
    assert f'{tmp_path / "mmcv"} has none compiled' in err.splitlines()[-2]


@pytest.mark.parametrize('version', ['', 'Version: of-our-own\n'])
def test_import_survives_versions_that_cannot_be_read(version, tmp_path):
    for name in (*DISTRIBUTIONS['mmseg'], 'transformers', 'setuptools'):
        (tmp_path / f'{name}.dist-info').mkdir()
        (tmp_path / f'{name}.dist-info' / 'METADATA').write_text(f'Name: {name}\n{version}')
    result = run_python('import mmtoken', tmp_path)
    assert 'Error: mmtoken found' in result.stderr or result.returncode == 0, result.stderr


def test_import_is_light_and_enables_config_paths():
    code = (
        'import mmtoken, sys; from mmengine.config.utils import MODULE2PACKAGE as m; '
        'from mmengine.utils import get_installed_path, is_installed; '
        'print(*(name in sys.modules for name in ("torch", "mmcv", "mmtoken.backbones")), '
        'is_installed(m["mmtoken"]), get_installed_path(m["mmtoken"]))'
    )
    result = run_python(code)
    expected = ['False', 'False', 'False', 'True', str(Path(mmtoken.__file__).parent)]
    assert result.stdout.split() == expected, result.stderr
