"""Pretends to be a Python that has pip and torch; records how it is called.

It starts a dozen times in a set-up, so it imports little.
"""

import os
import sys

arguments = sys.argv[1:]
RECORDED = {'FORCE_CUDA', 'MMCV_WITH_OPS'} & set(os.environ)

with open(os.environ['FAKE_LOG'], 'a') as log:
    print(*arguments, *(f'{name}={os.environ[name]}' for name in RECORDED), file=log)


def download():
    if 'PIP_FIND_LINKS' in os.environ:
        pip = os.environ['FAKE_PIP']
        os.execv(pip, [pip, *arguments])
    sys.exit(1)


def list_wheel():
    import zipfile

    zipfile.main(arguments[2:])


def build_wheel():
    import time
    import zipfile

    folder = arguments[arguments.index('--wheel-dir') + 1]
    wheel = os.path.join(folder, os.environ['FAKE_WHEEL'])
    build = os.environ.get('FAKE_BUILD')
    if build == 'fail':
        sys.exit('fatal error: out of cheese')
    if build == 'slow':
        time.sleep(1)
    if build == 'hang':
        for half_done in (wheel, os.path.join(os.environ['TMPDIR'], 'half.o')):
            open(half_done, 'w').close()
        os.system('sleep 60')
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('mmcv/_ext.cpython.so', '')


if os.environ.get('FAKE_FAILURE', 'none') in arguments:
    sys.exit(1)
if 'sys.version_info' in arguments[1]:
    print(os.environ['FAKE_BASE'])
elif 'get_compiling_cuda_version' in arguments[1]:
    print(os.environ.get('FAKE_COMPILED_CUDA'))
elif 'torch.cuda' in arguments[1]:
    if cuda := os.environ.get('FAKE_CUDA'):
        print(cuda)
elif arguments[:2] == ['-m', 'zipfile']:
    list_wheel()
elif arguments[:3] == ['-m', 'pip', 'download']:
    download()
elif arguments[:3] == ['-m', 'pip', 'wheel']:
    build_wheel()
