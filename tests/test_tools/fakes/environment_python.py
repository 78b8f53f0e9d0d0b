"""Pretends to be the Python and the uv of an environment; records how it is called."""

import os
import sys
import time
import zipfile
from pathlib import Path

arguments = sys.argv[1:]
RECORDED = {'FORCE_CUDA', 'MMCV_WITH_OPS'} & set(os.environ)

with open(os.environ['FAKE_LOG'], 'a') as log:
    print(*arguments, *(f'{name}={os.environ[name]}' for name in RECORDED), file=log)


def value_of(option):
    return arguments[arguments.index(option) + 1]


def build_wheel():
    wheel = Path(value_of('--wheel-dir'), os.environ['FAKE_WHEEL'])
    build = os.environ.get('FAKE_BUILD')
    if build == 'fail':
        sys.exit('fatal error: out of cheese')
    if build == 'slow':
        time.sleep(1)
    if build == 'hang':
        for half_done in (wheel, Path(os.environ['TMPDIR'], 'half.o')):
            half_done.touch()
        time.sleep(60)
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('mmcv/_ext.cpython.so', '')


def find_wheel():
    folders = [value_of('--find-links'), os.environ.get('UV_FIND_LINKS', '/nowhere')]
    if not any(Path(folder, os.environ['FAKE_WHEEL']).exists() for folder in folders):
        sys.exit('no solution found')


if os.environ.get('FAKE_FAILURE', 'none') in ' '.join(arguments):
    sys.exit(1)
if 'sys.version_info' in arguments[1]:
    print(os.environ['FAKE_BASE'])
elif arguments[:3] == ['-m', 'pip', 'wheel']:
    build_wheel()
elif '--find-links' in arguments:
    find_wheel()
