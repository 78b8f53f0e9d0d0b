"""The command ``mmtoken``."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import mmtoken
from mmtoken import cli


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """What a tool changes of its process, which is that of the tests here."""
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])


def test_help_lists_all_verbs(capsys):
    assert cli.main(['--help']) == 0
    printed = capsys.readouterr().out
    assert all(f'  {verb} ' in printed for verb in cli.VERBS)


def test_version(capsys):
    assert cli.main(['--version']) == 0
    assert capsys.readouterr().out == f'{mmtoken.__version__}\n'


@pytest.mark.parametrize('arguments, message', [([], 'usage'), (['flop'], "no verb 'flop'; there")])
def test_no_such_verb(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize('verb', cli.VERBS)
def test_each_verb_has_a_tool_that_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, '--help'])
    assert end.value.code == 0
    assert f'usage: mmtoken {verb}' in capsys.readouterr().out


def test_a_tool_gets_its_arguments_and_its_code_is_kept(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(['flops', 'none.py'])
    assert end.value.code == 1 and 'none.py' in capsys.readouterr().err


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, 'TOOLS', tmp_path)
    with pytest.raises(SystemExit, match='train.py is missing.*pip install'):
        cli.main(['train', 'config.py'])


def test_command_is_declared():
    (command,) = entry_points(group='console_scripts', name='mmtoken')
    assert command.load() is cli.main


@pytest.mark.parametrize('problem, code', [(False, 0), (True, 1)])
def test_env(problem, code, tmp_path):
    """Also where mmtoken refuses to be imported."""
    environment = dict(os.environ)
    if problem:  # a distribution that is too old
        folder = tmp_path / 'mmcv_full-1.7.0.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text('Name: mmcv-full\nVersion: 1.7.0\n')
        path = os.pathsep.join([str(tmp_path), environment.get('PYTHONPATH', '')])
        environment |= dict(PYTHONPATH=path, MMTOKEN_SKIP_STACK_CHECK='1')
    result = subprocess.run(
        [sys.executable, '-m', 'mmtoken', 'env'], env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    assert f'mmtoken: {mmtoken.__version__}' in result.stdout
    assert 'STViTRSwin' in result.stdout and 'TokenLossHook' in result.stdout
    assert ('mmcv-full 1.7.0 is too old' in result.stdout) == bool(problem)
