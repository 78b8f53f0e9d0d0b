"""Pages: tables are fresh, links and commands lead somewhere, names exist, examples run."""

import logging
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tables
import token_picture
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

import mmtoken
import mmtoken.heads.instance
import mmtoken.heads.semantic  # noqa: F401 -- both register a head
from mmtoken import registry
from mmtoken.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / name
    for name in subprocess.run(
        ['git', 'ls-files', '*.md'], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.S | re.M)
# What quoted paths may begin with; work_dirs/ and checkpoints/ are of the reader's own making.
FOLDERS = ('benchmarks/', 'configs/', 'docs/', 'mmtoken/', 'requirements/', 'tests/', 'tools/')
EXAMPLES = (ROOT / 'README.md', ROOT / 'docs' / 'get_started.md')


def each(pages):
    return pytest.mark.parametrize('page', pages, ids=lambda page: str(page.relative_to(ROOT)))


@each(PAGES)
def test_tables_are_fresh(page):
    text = page.read_text()
    assert text.count('<!-- table:') == len(tables.MARK.findall(text)) == text.count('<!-- end -->')
    assert tables.fill(text) == text, 'run tools/docs/tables.py'


def test_a_figure_changed_by_hand_is_found():
    text = '<!-- table: scores dge -->\n' + tables.TABLES['scores']('dge') + '<!-- end -->\n'
    assert tables.fill(text) == text
    changed = text.replace('43.00', '47.00')
    assert changed != text and tables.fill(changed) == text


def test_tables_name_what_is_missing():
    with pytest.raises(ValueError, match='no benchmarks/macs/nothing.json'):
        tables.TABLES['macs']('nothing')
    with pytest.raises(ValueError, match='no row of light.yml has both a title and results'):
        tables.TABLES['means']('light')
    with pytest.raises(KeyError):
        tables.fill('<!-- table: nothing -->\n<!-- end -->')


@each(PAGES)
def test_links(page):
    text = BLOCK.sub('', page.read_text())
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith('https://'):
            continue
        file, _, anchor = target.partition('#')
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place / 'README.md' if place.is_dir() else place), target


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', BLOCK.sub('', page.read_text()), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@each(PAGES)
def test_quoted_paths_exist(page):
    """In code, inline and in blocks; with braces, stars and shell variables."""
    text = page.read_text()
    variables = dict(re.findall(r'^([A-Z])=(\S+)$', text, re.M))
    quoted = re.findall(r'`([^`\n]+)`', BLOCK.sub('', text))
    for language, block in BLOCK.findall(text):
        if language in ('bash', 'python'):
            quoted += block.splitlines()
    words = [word for line in quoted for word in re.split(r'[\s\'"=():,]+(?![^{]*\})', line)]
    for word in words:
        word = re.sub(r'\$([A-Z])\b', lambda m: variables.get(m[1], m[0]), word)
        if word.startswith(FOLDERS) and not re.search(r'NAME|\$|\.\.\.', word):
            for path in expand(word):
                assert list(ROOT.glob(path)), path


def expand(word):
    """Braces as in a shell, which brace expansions of one comma-separated list are."""
    found = re.search(r'\{([^{}]*)\}', word)
    if not found:
        return [word]
    return [
        path
        for option in found[1].split(',')
        for path in expand(word[: found.start()] + option + word[found.end() :])
    ]


@each(sorted(ROOT.glob('configs/*/README.md')))
def test_pages_list_their_configs(page):
    """All configs of the folder, and no others; generated tables aside."""
    names = {path.stem for path in page.parent.glob('*.py')}
    quoted = re.findall(r'`([^`\s]+)`', tables.MARK.sub('', BLOCK.sub('', page.read_text())))
    listed = {name for word in quoted for name in expand(word) if re.search(r'_\d+xb\d+', name)}
    assert {Path(name).name.removesuffix('.py') for name in listed} == names


@each(PAGES)
def test_names_exist(page):
    """``mmtoken.Name`` in running text and in blocks."""
    text = page.read_text()
    for name in set(re.findall(r'\bmmtoken\.([A-Za-z_][\w.]*\w)', text)):
        first, *rest = name.split('.')
        if first in ('git', 'py') or (ROOT / 'mmtoken' / first).exists():
            assert not rest or exists(name), name
        else:
            assert hasattr(mmtoken, first) or registered(first), name


def exists(name):
    path = ROOT / 'mmtoken' / name.replace('.', '/')
    return path.is_dir() or path.with_suffix('.py').exists()


@cache
def registered(name):
    return any(known.get(name) is not None for known in registry.ALL)


@each(sorted(ROOT.glob('configs/*/README.md')))
def test_code_column(page):
    """Classes and functions that the tables of a method name are defined."""
    rows = re.findall(r'^\| \*\*.+\| ([^|]+) \|$', page.read_text(), re.M)
    for name in re.findall(r'`(\w+(?:\.\w+)?)\b', ' '.join(rows)):
        for part in name.split('.'):
            assert re.search(rf'^ *(class|def) {part}\b', sources(), re.M), name


@cache
def sources():
    return '\n'.join(path.read_text() for path in sorted((ROOT / 'mmtoken').rglob('*.py')))


@pytest.mark.parametrize('page', EXAMPLES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    """Python blocks: configs are read and their backbones built, the rest is executed in turn."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in BLOCK.findall(page.read_text()) if language == 'python']
    names, built = {}, 0
    for block in blocks:
        # The former needs a trained detector, the latter is run by test_hugging_face.py.
        if 'Inferencer' in block or 'from transformers' in block:
            compile(block, page.name, 'exec')
        elif '_base_' in block:
            cfg = read(block, tmp_path)
            with torch.device('meta'):  # no values
                built_type = type(MODELS.build(cfg.model.backbone))
            assert built_type.__module__.startswith('mmtoken.backbones.')
            base = read(re.sub('^custom_hooks.*$', '', block, flags=re.M), tmp_path)
            assert all(hook in cfg.custom_hooks for hook in base.get('custom_hooks', []))
            built += 1
        else:
            exec(block, names)
            said = re.findall(r'^# (\[.*)$', block, re.M)
            assert capsys.readouterr().out.splitlines() == said
    assert built and len(blocks) >= built


def read(block, folder):
    (folder / 'my_config.py').write_text(block)
    return Config.fromfile(folder / 'my_config.py')


def test_commands_parse():
    """Blocks of shell commands have their quotes and continuations in order."""
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            if language == 'bash':
                shlex.split(block, comments=True)


def test_verbs_exist():
    """``mmtoken VERB`` in code, inline and in blocks."""
    for page in PAGES:
        code = re.findall(r'`([^`\n]+)`', page.read_text())
        code += [block for language, block in BLOCK.findall(page.read_text()) if language == 'bash']
        for verb in re.findall(r'^mmtoken (\S+)', '\n'.join(code), re.M):
            assert verb in (*VERBS, 'VERB', '--help'), f'{page}: {verb}'


def test_token_picture(tmp_path, monkeypatch, capsys):
    """It is drawn with the checkpoints that the commands of the page train."""
    from mmtoken.analysis.configs import load_config
    from mmtoken.analysis.recording import load_model

    args = []
    for name in ('msvit', 'vit'):
        (config,) = ROOT.glob(f'configs/shapes/fpn_{name}-nano_1xb16-*.py')
        checkpoint = tmp_path / f'{name}.pth'
        torch.save(dict(state_dict=load_model(load_config(config), None).state_dict()), checkpoint)
        args += [f'--{name}', str(config), str(checkpoint)]
    monkeypatch.setattr(sys, 'argv', ['token_picture.py', *args, '--out', str(tmp_path / 'a.png')])
    token_picture.main()
    logging.disable(logging.NOTSET)
    assert 'a.png' in capsys.readouterr().out
    width, height = Image.open(tmp_path / 'a.png').size
    assert width > 1000 and 0.6 < height / width < 0.8
