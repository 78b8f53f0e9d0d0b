"""tools/setup_env.sh, run for real but in a world of fakes: nothing is downloaded or compiled.

Its PATH holds only basic commands, its Python is the real one less what a test takes away, and the
environments that this makes only pretend to install anything (see the folder ``fakes``).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
COMMANDS = 'awk bash cat cksum dirname env flock grep head mkdir mktemp mv rm sed sleep tail uname'
WHEEL = 'onedl_mmcv-2.3.6-py3-none-any.whl'


class World:
    """A clone of the project, and the machine around it."""

    def __init__(self, root: Path):
        self.root = root
        self.clone = self.add_clone('clone')
        self.bin = root / 'bin'
        self.bin.mkdir()
        for command in COMMANDS.split():
            if path := shutil.which(command):
                (self.bin / command).symlink_to(path)
        (self.bin / 'python3').symlink_to(sys._base_executable)
        self.add_command('c++')
        self.set_free_space(99)
        (root / 'Python.h').touch()
        self.version = '{}.{}'.format(*sys.version_info)
        self.cache = root / 'cache'
        self.log = root / 'log'
        self.environment = {
            'PATH': str(self.bin),
            'HOME': str(root),
            'MMTOKEN_CACHE': str(self.cache),
            'PIP_CONFIG_FILE': os.devnull,
            'PYTHONPATH': str(Path(__file__).with_name('fakes')),
            'TMPDIR': str(self._folder('tmp')),
            'FAKE_BASE': f'{self.version} {self.bin / "python3"}',
            'FAKE_HEADERS': str(root),
            'FAKE_LOG': str(self.log),
            'FAKE_PIP': sys.executable,
            'FAKE_WHEEL': WHEEL,
        }

    def add_clone(self, name: str) -> Path:
        clone = self._folder(name)
        shutil.copytree(REPO / 'requirements', clone / 'requirements')
        for file in ('tools/setup_env.sh', 'setup.py', 'pyproject.toml'):
            (clone / file).parent.mkdir(exist_ok=True)
            shutil.copy(REPO / file, clone / file)
        return clone

    def add_command(self, name: str, text: str = '') -> None:
        (self.bin / name).write_text(f'#!{shutil.which("bash")}\n{text}\n')
        (self.bin / name).chmod(0o755)

    def set_free_space(self, gigabytes: int) -> None:
        """Let every folder be on one file system with so much free space."""
        row = f'disk 0 0 {gigabytes * 2**20} 0% /'
        self.add_command('df', f'printf "%s\\n" header "{row}"')

    def offer_wheel(self, *members: str) -> None:
        """Put a wheel of mmcv with these members where pip is told to look."""
        folder = self._folder('offers')
        self.environment['PIP_FIND_LINKS'] = str(folder)
        metadata = 'Metadata-Version: 2.1\nName: onedl-mmcv\nVersion: 2.3.6\n'
        with zipfile.ZipFile(folder / WHEEL, 'w') as wheel:
            for member in members:
                wheel.writestr(member, '')
            wheel.writestr('onedl_mmcv-2.3.6.dist-info/METADATA', metadata)
            wheel.writestr('onedl_mmcv-2.3.6.dist-info/WHEEL', 'Wheel-Version: 1.0\n')

    def start(self, *arguments: str, clone: Path | None = None) -> subprocess.Popen:
        self.log.write_text('')
        return subprocess.Popen(
            [(clone or self.clone) / 'tools/setup_env.sh', *arguments],
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Bash cannot trap a signal that was ignored at its start, as in a background job.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, code: int = 0, clone: Path | None = None) -> tuple[str, str]:
        """The outputs of a set-up that must end with this exit code."""
        process = self.start(*arguments, clone=clone)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, out + err
        return out, err

    def refusal(self, *arguments: str, code: int = 1) -> str:
        """The one line with which a set-up refuses to start."""
        _, err = self.run(*arguments, code=code)
        assert 'install' not in self.log.read_text()
        assert err.startswith('setup_env: ') and err.count('\n') == 1, err
        return err

    def wheels(self) -> list[Path]:
        """All that is in the cache, half-done things included, but folders and logs."""
        return [path for path in self.cache.glob('wheels/**/*') if path.is_file()]

    def was_built(self) -> bool:
        return '-m pip wheel' in self.log.read_text()

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize(
    'missing, complaint, package',
    [
        ('venv', 'cannot create virtual environments', 'python{}-venv'),
        ('headers', 'there is no /nowhere/Python.h', 'python{}-dev'),
        ('libGL.so.1', 'OpenCV needs the system library libGL.so.1', 'libgl1'),
        ('libgthread-2.0.so.0', 'OpenCV needs the system library libgthread', 'libglib2.0-0'),
    ],
)
def test_missing_part_of_python_or_system(world, missing, complaint, package):
    world.environment['FAKE_MISSING'] = missing
    refusal = world.refusal()
    assert complaint in refusal
    assert refusal.endswith(f'; run: apt-get install {package.format(world.version)}\n')


def test_missing_compiler(world):
    (world.bin / 'c++').unlink()
    assert world.refusal().endswith('there is no c++; run: apt-get install g++\n')


def test_all_that_is_missing_is_told_at_once(world):
    (world.bin / 'c++').unlink()
    world.environment['FAKE_MISSING'] = 'libGL.so.1 headers'
    _, err = world.run(code=1)
    assert [line.split()[-1] for line in err.splitlines()] == [
        'libgl1',
        'g++',
        f'python{world.version}-dev',
    ]


@pytest.mark.parametrize(
    'stack, version', [('onedl', '3.13'), ('onedl', '3.9'), ('upstream', '3.12')]
)
def test_unsupported_python(world, stack, version):
    world.environment['FAKE_VERSION'] = version
    refusal = world.refusal(stack)
    assert f'the {stack} stack needs Python 3.10 or 3.11' in refusal
    assert f'but python3 is {version}; run: apt-get install python3.11' in refusal


def test_absent_python(world):
    world.environment['PYTHON'] = 'python4'
    assert 'but there is no python4; run: apt-get install' in world.refusal()


def test_too_little_disk_space(world):
    world.set_free_space(10)
    refusal = world.refusal()
    assert '11 GB are needed on /' in refusal and 'but 10 GB are free' in refusal


def test_unknown_stack(world):
    assert "no stack 'onedI'" in world.refusal('onedI', code=2)


def test_help(world):
    out, _ = world.run('--help')
    assert out.startswith('Usage: ') and 'MMTOKEN_CACHE' in out
    assert not (world.clone / '.venv').exists()


def test_set_up_once(world):
    out, _ = world.run()
    assert "==> Compiling mmcv's ops" in out
    assert [wheel.name for wheel in world.wheels()] == [WHEEL]
    installations = [line for line in world.log.read_text().splitlines() if 'pip install' in line]
    assert len(installations) == 5
    assert all('constraints-onedl.txt' in line for line in installations)  # torch stays pinned
    stamp = world.clone / '.venv/.stamp'
    written = stamp.stat().st_mtime_ns

    started = time.monotonic()
    out, _ = world.run()
    assert time.monotonic() - started < 2
    assert out.count('\n') == 1 and 'is ready' in out
    assert 'pip' not in world.log.read_text()
    assert stamp.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    'cuda, nvcc, variant, force_cuda',
    [
        ('13.0 sm80-sm90', '13.0', 'cu130-sm80-sm90', 1),
        ('13.0 sm90', '12.4', 'cpu', 0),
        ('13.0 sm90', None, 'cpu', 0),
    ],
)
def test_ops_for_the_gpu_need_a_gpu_and_its_compiler(world, cuda, nvcc, variant, force_cuda):
    world.environment['FAKE_CUDA'] = cuda
    if nvcc:
        add_nvcc(world, nvcc)
    _, err = world.run()
    (wheel,) = world.wheels()
    assert wheel.parent.name == f'2.11.0-cp{world.version.replace(".", "")}-{variant}'
    assert f'FORCE_CUDA={force_cuda}' in world.log.read_text()
    assert ('on the CPU only' in err) == (variant == 'cpu')


NO_GPU = "mmcv's ops will run on the CPU only, so detectors fail on a GPU: torch sees no GPU here"


def add_nvcc(world, version='13.0'):
    world.add_command('nvcc', f'echo "Cuda compilation tools, release {version}, V{version}.88"')


def variants(world):
    return sorted(wheel.parent.name.split('-', 2)[2] for wheel in world.wheels())


def test_ops_are_compiled_anew_when_a_gpu_has_come(world):
    _, err = world.run()
    assert NO_GPU in err and 'set up again' in err
    world.environment['FAKE_CUDA'] = '13.0 sm90'
    add_nvcc(world)
    _, err = world.run()
    assert world.was_built() and variants(world) == ['cpu', 'cu130-sm90'] and not err

    out, err = world.run()
    assert out.count('\n') == 1 and not err
    assert 'torch' not in world.log.read_text()  # which takes seconds to import


def test_login_node_with_nvcc_looks_for_a_gpu_once(world):
    add_nvcc(world)
    _, err = world.run()
    assert NO_GPU in err and variants(world) == ['cpu']
    world.run()
    assert 'torch' not in world.log.read_text()


def test_ops_for_cuda_stay_where_there_is_no_gpu(world):
    world.environment['FAKE_CUDA'] = '13.0 sm90'
    add_nvcc(world)
    world.run()
    del world.environment['FAKE_CUDA']
    (world.bin / 'nvcc').unlink()
    world.run()
    assert '-m pip install' not in world.log.read_text()

    with (world.clone / 'requirements/tests.txt').open('a') as file:
        file.write('# more\n')
    _, err = world.run()
    assert f'cu130-sm90/{WHEEL}' in world.log.read_text()
    assert not world.was_built() and not err


@pytest.mark.parametrize(
    'architectures, variant',
    [
        ('9.0', 'cu130-sm90'),
        ('8.0;9.0', 'cu130-sm80-sm90'),
        ('8.6 12.0+PTX', 'cu130-sm86-sm120+PTX'),
    ],
)
def test_ops_for_another_machines_gpu(world, architectures, variant):
    world.run()
    add_nvcc(world)
    world.environment |= {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': architectures}
    _, err = world.run()
    assert variants(world) == ['cpu', variant] and not err
    assert 'FORCE_CUDA=1' in world.log.read_text()
    world.run()
    assert 'torch' not in world.log.read_text()

    del world.environment['FORCE_CUDA'], world.environment['TORCH_CUDA_ARCH_LIST']
    world.environment['FAKE_CUDA'] = f'13.0 {variant.partition("-")[2]}'
    world.run()
    assert not world.was_built()


def test_forced_cuda_for_other_gpus(world):
    add_nvcc(world)
    world.environment |= {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '8.0'}
    world.run()
    world.environment['TORCH_CUDA_ARCH_LIST'] = '9.0'
    world.run()
    assert variants(world) == ['cu130-sm80', 'cu130-sm90']

    (world.bin / 'nvcc').unlink()  # on a node of the cluster that has no compiler
    world.run()
    assert not world.log.read_text().count('-m pip')


@pytest.mark.skipif(any(Path('/dev').glob('nvidia[0-9]*')), reason='there is a GPU')
def test_forced_cuda_needs_a_compiler_and_a_target(world):
    world.environment['FORCE_CUDA'] = '1'
    _, err = world.run(code=1)
    assert [line.split(' needs ')[0] for line in err.splitlines()] == [
        'setup_env: FORCE_CUDA=1',
        'setup_env: FORCE_CUDA=1 without a GPU',
    ]
    world.environment['TORCH_CUDA_ARCH_LIST'] = '9.0'
    assert 'FORCE_CUDA=1 needs nvcc on PATH' in world.refusal()


def test_offered_wheel_without_ops_for_the_gpu(world):
    world.offer_wheel('mmcv/_ext.cpython.so')
    world.environment |= {'FAKE_CUDA': '13.0 sm90', 'FAKE_COMPILED_CUDA': 'not available'}
    add_nvcc(world)
    _, err = world.run(code=1)
    assert f'no ops for it are in {WHEEL} of PIP_FIND_LINKS; take it out of there' in err


def test_second_clone_takes_the_cached_wheel_without_a_compiler(world):
    world.run()
    (world.bin / 'c++').unlink()
    world.run(clone=world.add_clone('second'))
    assert not world.was_built()


def test_offered_wheel_spares_the_compiler(world):
    (world.bin / 'c++').unlink()
    world.offer_wheel('mmcv/_ext.cpython.so')
    world.run()
    assert not world.was_built() and not world.wheels()
    assert WHEEL in world.log.read_text()


def test_offered_wheel_without_ops_is_passed_over(world):
    world.offer_wheel('mmcv/__init__.py')
    out, _ = world.run()
    assert out.count(f'Passing over the {WHEEL}') == 1
    assert world.was_built()


def test_offered_wheel_for_another_torch(world):
    world.offer_wheel('mmcv/_ext.cpython.so')
    world.environment['FAKE_FAILURE'] = 'import torch, mmcv._ext'
    _, err = world.run(code=1)
    assert f'torch 2.11.0 cannot load {WHEEL} of PIP_FIND_LINKS; take it out of there' in err


def test_failed_build_shows_the_end_of_its_log(world):
    world.environment['FAKE_BUILD'] = 'fail'
    _, err = world.run(code=1)
    assert '    | fatal error: out of cheese\n' in err
    assert "failed: Compiling mmcv's ops" in err and str(world.cache / 'logs') in err
    assert not world.wheels()


@pytest.mark.parametrize('signum, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_build_leaves_nothing(world, signum, code):
    world.environment['FAKE_BUILD'] = 'hang'
    process = world.start()
    deadline = time.monotonic() + 20
    while len(world.wheels()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(world.wheels()) == 2, 'the build did not start'
    process.send_signal(signum)
    process.communicate(timeout=10)  # returns once nobody holds the pipes: the build ended, too
    assert process.returncode == code
    assert not world.wheels() and not list(world.cache.glob('wheels/*/.build*'))
    assert not list(Path(world.environment['TMPDIR']).iterdir())

    del world.environment['FAKE_BUILD']
    world.run()
    assert [wheel.name for wheel in world.wheels()] == [WHEEL]


def test_two_set_ups_at_once_build_once(world):
    world.environment['FAKE_BUILD'] = 'slow'
    processes = [world.start(), world.start(clone=world.add_clone('second'))]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum('==> Compiling' in out for out in outputs) == 1


def test_interrupted_installation_is_remade(world):
    world.environment['FAKE_FAILURE'] = '--editable'
    world.run(code=1)
    leftover = world.clone / '.venv/leftover'
    leftover.touch()
    del world.environment['FAKE_FAILURE']
    world.run()
    assert not leftover.exists()


def test_changed_requirements_update_in_place(world):
    world.run()
    extra = world.clone / '.venv/extra'
    extra.touch()
    with (world.clone / 'requirements/tests.txt').open('a') as file:
        file.write('# more\n')
    world.set_free_space(0)
    world.run()
    assert '-m pip install' in world.log.read_text()
    assert extra.exists()


def test_broken_environment_is_remade(world):
    world.run()
    python = world.clone / '.venv/bin/python'
    python.unlink()
    python.symlink_to('/nowhere/python')
    world.run()
    assert '-m pip install' in world.log.read_text()


def test_another_python_remakes_the_environment(world):
    world.run()
    leftover = world.clone / '.venv/leftover'
    leftover.touch()
    other = '3.10' if world.version != '3.10' else '3.11'
    world.environment |= {'PYTHON': 'python3', 'FAKE_VERSION': other}
    world.run()
    assert not leftover.exists()


def test_shell_scripts_are_clean():
    shellcheck = shutil.which('shellcheck', path=Path(sys.executable).parent) or 'shellcheck'
    scripts = [REPO / '.ci/run', *REPO.glob('tools/**/*.sh')]
    outcome = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout
