"""Stands in for the module of that name: its environments hold only environment_python.py."""

import shutil
import sys
from pathlib import Path

if __name__ == '__main__':
    folder = Path(sys.argv[-1], 'bin')
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    script = Path(__file__).with_name('environment_python.py').read_text()
    for name in ('python', 'uv'):
        (folder / name).write_text(f'#!{sys.executable} -IS\n{script}')
        (folder / name).chmod(0o755)
