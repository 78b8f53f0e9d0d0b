import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from mmtoken.library import shipped_file

TOOLS = Path(__file__).resolve().parent.parent.parent / 'tools'


def run(*args, **kwargs):
    return subprocess.run(list(map(str, args)), capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_help_teaches(tool):
    result = run(sys.executable, TOOLS / f'{tool}.py', '--help')
    assert result.returncode == 0
    assert '--cfg-options' in result.stdout and f'mmtoken {tool} CONFIG' in result.stdout
    assert run(sys.executable, TOOLS / f'{tool}.py').returncode == 2


def test_missing_config_and_unknown_scope(tmp_path):
    result = run(sys.executable, TOOLS / 'train.py', tmp_path / 'none.py')
    assert result.returncode == 1 and 'no config file' in result.stderr
    (tmp_path / 'config.py').write_text("default_scope = 'mmpose'\n")
    result = run(sys.executable, TOOLS / 'train.py', tmp_path / 'config.py')
    assert result.returncode == 1 and "'mmpose'; it must be one of mmdet" in result.stderr


@pytest.mark.parametrize('suffix', ['', '.py', '.json', '.yaml'])
def test_what_is_no_config(suffix, tmp_path, monkeypatch):
    from dispatch import main

    folder = tmp_path / f'folder{suffix}'
    folder.mkdir()
    for given, words in ((folder, 'this is a folder'), (tmp_path / f'none{suffix}', 'none')):
        monkeypatch.setattr(sys, 'argv', ['test.py', str(given), 'epoch_1.pth'])
        with pytest.raises(SystemExit, match=f'^test.py: no config file .*{words}'):
            main('test')


@pytest.mark.parametrize(
    'name, text',
    [
        ('a.py', "_base_ = ['mmtoken::shapes/fpn_vit-nano_1xb16-1500i_shapes-128x128.py']"),
        ('b.json', '{"default_scope": "mmseg"}'),
        ('c.yaml', 'default_scope: mmseg'),
        ('d.py', 'from mmseg.models import EncoderDecoder\nmodel = dict(type=EncoderDecoder)'),
    ],
)
def test_all_styles_of_configs(name, text, tmp_path, monkeypatch):
    import dispatch

    (tmp_path / name).write_text(f'{text}\n')
    called = []
    monkeypatch.setattr(dispatch.runpy, 'run_path', lambda path, **kwargs: called.append(path))
    monkeypatch.setattr(sys, 'argv', ['train.py', str(tmp_path / name), '--amp'])
    dispatch.main('train')
    assert called == [str(shipped_file('mmseg', 'tools/train.py'))]


def test_a_config_that_a_library_ships(monkeypatch):
    """Its file is what the library's tool is given."""
    import dispatch

    called = []
    monkeypatch.setattr(dispatch.runpy, 'run_path', lambda path, **kwargs: called.append(sys.argv))
    name = 'retinanet/retinanet_r50_fpn_1x_coco.py'
    monkeypatch.setattr(sys, 'argv', ['train.py', f'mmdet::{name}', '--amp'])
    dispatch.main('train')
    assert called == [['train.py', str(shipped_file('mmdet', f'configs/{name}')), '--amp']]


@pytest.mark.parametrize(
    'scope, words', [('mmdet', 'Train a detector'), ('mmseg', 'Train a segmentor')]
)
def test_the_library_of_the_config_answers(scope, words, tmp_path):
    (tmp_path / 'config.py').write_text(f'default_scope = {scope!r}\n')
    result = run(sys.executable, TOOLS / 'train.py', tmp_path / 'config.py', '--help')
    assert result.returncode == 0 and words in result.stdout


def fake_command(folder, name):
    path = folder / name
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}'}


def test_dist_launchers(tmp_path):
    env = fake_command(tmp_path, 'python') | dict(PORT='29501')
    result = run(TOOLS / 'dist_train.sh', 'c.py', '8', '--amp', '--cfg-options', 'a="b c"', env=env)
    words = result.stdout.splitlines()
    assert words[:2] == ['-m', 'torch.distributed.run']
    assert '--nproc_per_node=8' in words and '--master_port=29501' in words
    assert words[-6:] == ['c.py', '--launcher', 'pytorch', '--amp', '--cfg-options', 'a="b c"']
    words = run(TOOLS / 'dist_test.sh', 'c.py', 'w.pth', '2', env=env).stdout.splitlines()
    assert words[-4:] == ['c.py', 'w.pth', '--launcher', 'pytorch']


def test_dist_launchers_span_machines(tmp_path):
    env = fake_command(tmp_path, 'python') | dict(
        NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='29501'
    )
    for command in (('dist_train.sh', 'c.py', '8'), ('dist_test.sh', 'c.py', 'w.pth', '8')):
        words = run(TOOLS / command[0], *command[1:], env=env).stdout.splitlines()
        assert words[2:7] == [
            '--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=29501',
            '--nproc_per_node=8',
        ]  # fmt: skip


@pytest.mark.parametrize(
    'device, processes, refused',
    [
        ('cuda', '2', False),
        ('cuda', '3', True),
        ('cuda', 'gpu', False),
        ('npu', '8', False),
        ('cpu', '2', False),
        ('mps', '2', True),
    ],
)
def test_no_more_processes_than_gpus(device, processes, refused, monkeypatch):
    main = runpy.run_path(str(TOOLS / 'misc/check_devices.py'))['main']
    monkeypatch.setitem(main.__globals__, 'get_device', lambda: device)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    with pytest.raises(SystemExit, match='sees 2|of Apple') if refused else nullcontext():
        main('dist_train.sh', processes)


def test_slurm_launchers(tmp_path):
    env = fake_command(tmp_path, 'srun') | dict(SRUN_ARGS='--quotatype=auto -x node1', GPUS='4')
    words = run(TOOLS / 'slurm_train.sh', 'gpu', 'job', 'c.py', 'out', '--amp', env=env)
    words = words.stdout.splitlines()
    assert words[:3] == ['-p', 'gpu', '--job-name=job'] and '--ntasks=4' in words
    assert words[words.index('-x') + 1] == 'node1'
    assert words[-6:] == ['c.py', '--work-dir', 'out', '--launcher', 'slurm', '--amp']
    words = run(TOOLS / 'slurm_test.sh', 'gpu', 'job', 'c.py', 'w.pth', env=env)
    assert words.stdout.splitlines()[-4:] == ['c.py', 'w.pth', '--launcher', 'slurm']


@pytest.mark.parametrize('name', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_launchers_tell_their_usage(name):
    result = run(TOOLS / f'{name}.sh')
    assert result.returncode == 2 and f'tools/{name}.sh' in result.stdout


def test_weights_of_a_backbone_alone_are_not_tested(tmp_path, monkeypatch):
    """MMEngine would warn, and print an AP of 0."""
    import torch
    from dispatch import main

    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmseg'\nmodel = dict(backbone=dict(type='ResNet'))\n")
    torch.save(dict(state_dict={'layers.0.weight': torch.zeros(1)}), tmp_path / 'swin.pth')
    monkeypatch.setattr(sys, 'argv', ['test.py', str(config), str(tmp_path / 'swin.pth')])
    with pytest.raises(SystemExit, match=r'holds no trained model: none of its 1 names has'):
        main('test')
    (tmp_path / 'swin.pth').write_text('<html>404</html>')
    with pytest.raises(SystemExit, match='is damaged or no checkpoint.*html'):
        main('test')


def test_a_damaged_checkpoint_is_not_resumed(tmp_path, monkeypatch):
    """A training was killed while it wrote its last checkpoint, and the one before was removed."""
    import torch
    from dispatch import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text("default_scope = 'mmseg'\nwork_dir = 'out'\n")
    out = tmp_path / 'out'
    out.mkdir()

    def resume(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train.py', 'config.py', *arguments])
        main('train')

    torch.save(dict(a=torch.zeros(100)), out / 'iter_1.pth')
    torch.save(dict(a=torch.zeros(100)), out / 'iter_2.pth')
    (out / 'last_checkpoint').write_text(str(out / 'iter_2.pth'))
    whole = (out / 'iter_2.pth').read_bytes()
    (out / 'iter_2.pth').write_bytes(whole[: len(whole) // 2])
    advice = 'whole is out/iter_1.pth: instead .* load_from=out/iter_1.pth resume=True'
    with pytest.raises(SystemExit, match=f'iter_2.pth, the last checkpoint, is damaged.*{advice}'):
        resume('--resume')
    (out / 'iter_2.pth').unlink()
    with pytest.raises(SystemExit, match='iter_2.pth, the last checkpoint, is gone'):
        resume('--resume', '--amp')
    (out / 'last_checkpoint').write_text('')  # killed while it wrote this
    with pytest.raises(SystemExit, match=f'last_checkpoint is empty.*{advice}'):
        resume('--resume')
    (out / 'last_checkpoint').write_text(str(out / 'iter_2.pth'))
    (out / 'iter_1.pth').unlink()
    with pytest.raises(SystemExit, match='is gone, and out has no other'):
        resume('--work-dir', 'out', '--resume')
    called = []
    monkeypatch.setattr('runpy.run_path', lambda *args, **kwargs: called.append(args))
    resume('--resume', '--work-dir=other')  # nothing was trained there
    (out / 'iter_2.pth').write_bytes(whole)
    resume('--resume')
    assert len(called) == 2
