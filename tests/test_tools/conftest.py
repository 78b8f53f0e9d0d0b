import importlib
import logging
import sys
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tool in this process: ``run('flops', CONFIG, '--shape', 64, 64)``."""

    def call(name, *args):
        tool = importlib.import_module(name)
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
        capsys.readouterr()
        try:
            code = tool.main()
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    yield call
    logging.disable(logging.NOTSET)  # which tools that run alone raise
