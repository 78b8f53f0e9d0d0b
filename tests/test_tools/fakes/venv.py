"""Stands in for the module of that name: its environments hold only environment_python.py."""

import sys
from pathlib import Path

if __name__ == '__main__':
    python = Path(sys.argv[1], 'bin', 'python')
    python.parent.mkdir(parents=True)
    script = Path(__file__).with_name('environment_python.py').read_text()
    python.write_text(f'#!{sys.executable} -IS\n{script}')
    python.chmod(0o755)
