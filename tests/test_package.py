"""What is installed is what the project holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_mim_symlinks():
    mim = ROOT / 'mmtoken' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink() and (mim / name).samefile(ROOT / name)


def test_wheel_holds_configs_tools_and_model_index(tmp_path):
    listed = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = listed.stdout.splitlines()
    source = tmp_path / 'source'  # building leaves files behind, so not in the project itself
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    subprocess.run([*command, '-w', tmp_path, source], check=True)

    (wheel,) = tmp_path.glob('mmtoken-*.whl')
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {n for n in tracked if n.startswith('mmtoken/') and not n.startswith('mmtoken/.mim')}
    expected |= {f'mmtoken/.mim/{n}' for n in tracked if n.startswith(('configs/', 'tools/'))}
    expected.add('mmtoken/.mim/model-index.yml')
    assert {n for n in held if '.dist-info/' not in n} == expected
