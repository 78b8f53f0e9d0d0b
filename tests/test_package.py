"""What is installed is what the project holds."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mmtoken.clashes import DISTRIBUTIONS
from mmtoken.stack import find_problems

ROOT = Path(__file__).resolve().parent.parent
CONFIG = 'mmtoken::stvit_r/mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'


def test_mim_symlinks():
    mim = ROOT / 'mmtoken' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink() and (mim / name).samefile(ROOT / name)


def tracked():
    listed = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)]


@pytest.fixture
def source(tmp_path):
    """A checkout: building leaves files behind, so not in the project itself."""
    source = tmp_path / 'source'
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


def take_links_away(source):
    """What git does where there are no symbolic links: files that hold what the links would."""
    for link in (source / 'mmtoken' / '.mim').iterdir():
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)


def expected_names():
    names = {n for n in tracked() if n.startswith('mmtoken/') and not n.startswith('mmtoken/.mim')}
    names |= {f'mmtoken/.mim/{n}' for n in tracked() if n.startswith(('configs/', 'tools/'))}
    return names | {'mmtoken/.mim/model-index.yml'}


def held(wheel):
    return {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}


def build(source, kind, python_path=None):
    """What pip does behind --no-build-isolation: make a 'wheel', 'editable' or 'sdist'."""
    code = f'import sys; from setuptools.build_meta import *; print(build_{kind}(sys.argv[1]))'
    environment = {n: v for n, v in os.environ.items() if n != 'PYTHONPATH'}
    if python_path is not None:
        environment['PYTHONPATH'] = str(python_path)
    result = subprocess.run(
        [sys.executable, '-c', code, source.parent / 'out'],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(result.stderr)
    return source.parent / 'out' / result.stdout.splitlines()[-1]


@pytest.fixture
def no_links(tmp_path):
    """On its path, this folder takes from a Python the right to make symbolic links."""
    folder = tmp_path / 'no_links'
    folder.mkdir()
    (folder / 'sitecustomize.py').write_text(
        'import os\n'
        'def symlink(*args, **kwargs): raise OSError("symbolic link privilege not held")\n'
        'os.symlink = symlink\n'
    )
    return folder


def test_wheel_holds_configs_tools_and_model_index(source):
    assert held(build(source, 'wheel')) == expected_names()


@pytest.mark.parametrize('can_link', [True, False])
def test_wheel_from_a_checkout_without_links(source, no_links, can_link):
    take_links_away(source)
    wheel = build(source, 'wheel', python_path=None if can_link else no_links)
    assert held(wheel) == expected_names()
    assert (source / 'mmtoken/.mim/configs').is_symlink() == can_link


def test_wheel_from_a_source_distribution(source):
    take_links_away(source)
    archive = build(source, 'sdist')
    shutil.unpack_archive(archive, source.parent / 'unpacked')
    (unpacked,) = (source.parent / 'unpacked').iterdir()
    assert not (unpacked / 'configs').exists()
    assert held(build(unpacked, 'wheel')) == expected_names()


@pytest.mark.parametrize('can_link', [True, False])
def test_editable_install_of_a_checkout_without_links(source, no_links, can_link):
    take_links_away(source)
    python_path = None if can_link else no_links
    build(source, 'editable', python_path)
    result = read_config(source)
    assert result.stdout.splitlines()[-2:] == [str(source / 'mmtoken/__init__.py'), 'MaskRCNN']

    (source / 'configs/new.py').touch()
    assert (source / 'mmtoken/.mim/configs/new.py').exists() == can_link
    build(source, 'editable', python_path)  # brings a copy up to date
    assert (source / 'mmtoken/.mim/configs/new.py').exists()


def read_config(source):
    code = (
        'import mmtoken; from mmengine.config import Config; print(mmtoken.__file__); '
        'print(Config.fromfile("mine.py").model.type)'
    )
    (source / 'mine.py').write_text(f'_base_ = {CONFIG!r}\n')
    environment = {**os.environ, 'PYTHONPATH': str(source)}
    return subprocess.run(
        [sys.executable, '-c', code], cwd=source, env=environment, capture_output=True, text=True
    )


def test_uninstalled_checkout_without_links_says_so(source):
    take_links_away(source)
    err = read_config(source).stderr
    assert 'UserWarning: no `mmtoken::` config path will resolve' in err
    assert 'pip install --no-build-isolation -e .' in err


@pytest.mark.parametrize('lost', ['configs', 'tools', 'model-index.yml'])
def test_incomplete_checkout_is_refused(source, lost):
    take_links_away(source)
    shutil.move(source / lost, source.parent / 'lost')
    with pytest.raises(RuntimeError, match=f'setup.py: cannot make .*{lost} a link'):
        build(source, 'wheel')


@pytest.fixture
def declared(monkeypatch):
    """What setup.py requires: extra, or None, to the specifier of each distribution."""
    arguments = {}
    monkeypatch.setattr('setuptools.setup', arguments.update)
    monkeypatch.setattr('setuptools.find_packages', lambda **kwargs: [])
    exec((ROOT / 'setup.py').read_text(), {'__file__': str(ROOT / 'setup.py')})
    lists = {None: arguments['install_requires'], **arguments['extras_require']}
    return {
        extra: {r.name: r.specifier for r in map(Requirement, requirements)}
        for extra, requirements in lists.items()
    }


def imported(folder):
    """Distributions that the files of a folder import, but OpenMMLab's and our own."""
    names = set()
    for path in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    here = {path.stem for path in (ROOT / folder).rglob('*')} | {'mmtoken'}
    modules = {name.partition('.')[0] for name in names} - sys.stdlib_module_names - here
    named_otherwise = dict(PIL='pillow', cv2='opencv-python', skimage='scikit-image', yaml='pyyaml')
    return {named_otherwise.get(module, module) for module in modules - DISTRIBUTIONS.keys()}


def test_imports_are_declared(declared):
    optional = imported('mmtoken') - declared[None].keys()
    assert declared[None].keys() < imported('mmtoken') and optional == {'onnxruntime', 'onnxscript'}
    assert optional < declared['export'].keys()
    assert imported('tools') <= declared[None].keys() | declared['tools'].keys()


def test_backbone_is_built_without_what_only_others_need():
    """Not even through what it imports: no drawing, no compiled ops, no detectors."""
    code = (
        'import sys, mmtoken\nfrom mmtoken.registry import MODELS\n'
        'MODELS.build(dict(type="mmtoken.STViTRSwin", arch="tiny"))\nprint(*sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    modules = set(result.stdout.split())
    assert {'mmtoken.backbones', 'mmtoken.checkpoints', 'timm'} <= modules, result.stderr
    unwanted = {'matplotlib', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmtoken.analysis'}
    assert not modules & {*unwanted, 'mmtoken.visualization', 'mmtoken.engine'}


def test_papers_of_all_methods_can_be_cited():
    collections = [
        collection
        for metafile in (ROOT / 'configs').glob('*/metafile.yml')
        for collection in yaml.safe_load(metafile.read_text()).get('Collections', [])
    ]
    papers = {c['Paper']['URL']: c['Paper']['Title'] for c in collections if 'Paper' in c}
    references = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['references']
    assert papers.items() <= {r['url']: r['title'] for r in references}.items()


def test_upstream_extra_passes_the_stack_check(declared):
    """The newest of what it allows, one at a time."""
    extra = declared['upstream']
    releases = {
        'mmengine': ['0.10.7'], 'mmcv': ['2.1.0', '2.2.0'], 'mmdet': ['3.3.0'],
        'mmsegmentation': ['1.2.2'], 'mmpretrain': ['1.2.0'], 'numpy': ['1.26.4', '2.2.6'],
        'torch': ['2.5.1', '2.6.0', '2.11.0'], 'setuptools': ['81.0.0', '82.0.0'],
    }  # fmt: skip
    chosen = {name: [*extra[name].filter(each)][-1] for name, each in releases.items()}
    assert find_problems(chosen.get) == []
