"""Pretends to be a Python that has pip and torch; records how it is called."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

arguments = sys.argv[1:]
RECORDED = {'FORCE_CUDA', 'MMCV_WITH_OPS'} & set(os.environ)
build = os.environ.get('FAKE_BUILD')

with open(os.environ['FAKE_LOG'], 'a') as log:
    print(*arguments, *(f'{name}={os.environ[name]}' for name in RECORDED), file=log)
if os.environ.get('FAKE_FAILURE', 'none') in arguments:
    sys.exit(1)
if 'sys.version_info' in arguments[1]:
    print(os.environ['FAKE_BASE'])
elif 'torch.cuda' in arguments[1]:
    if cuda := os.environ.get('FAKE_CUDA'):
        print(cuda)
elif arguments[:2] == ['-m', 'zipfile']:
    zipfile.main(arguments[2:])
elif arguments[:3] == ['-m', 'pip', 'download']:
    offers = 'PIP_FIND_LINKS' in os.environ  # without, spare the time to start pip
    sys.exit(subprocess.call([os.environ['FAKE_PIP'], *arguments]) if offers else 1)
elif arguments[:3] == ['-m', 'pip', 'wheel']:
    wheel = Path(arguments[arguments.index('--wheel-dir') + 1], os.environ['FAKE_WHEEL'])
    if build == 'fail':
        sys.exit('fatal error: out of cheese')
    if build == 'slow':
        time.sleep(1)
    if build == 'hang':
        Path(os.environ['TMPDIR'], 'half.o').touch()
        wheel.touch()
        subprocess.call(['sleep', '60'])
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('mmcv/_ext.cpython.so', '')
