"""The examples in docstrings run and print what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import mmtoken

ROOT = Path(mmtoken.__file__).parent
MODULES = [
    '.'.join(('mmtoken', *path.relative_to(ROOT).with_suffix('').parts))
    for path in sorted(ROOT.rglob('*.py'))
    if '>>> ' in path.read_text()
]


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted and not results.failed
