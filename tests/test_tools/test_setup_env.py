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
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
COMMANDS = 'bash cat cksum dirname env flock grep head mkdir mktemp mv rm sed sort tail tr uname'
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
        (root / 'Python.h').touch()
        self.version = '{}.{}'.format(*sys.version_info)
        self.cache = root / 'cache'
        self.log = root / 'log'
        self.environment = {
            'PATH': str(self.bin),
            'HOME': str(root),
            'MMTOKEN_CACHE': str(self.cache),
            'PYTHONPATH': str(Path(__file__).with_name('fakes')),
            'FAKE_BASE': f'{self.version} {self.bin / "python3"}',
            'FAKE_HEADERS': str(root),
            'FAKE_LOG': str(self.log),
            'FAKE_WHEEL': WHEEL,
        }

    def add_clone(self, name: str) -> Path:
        clone = self.root / name
        shutil.copytree(REPO / 'requirements', clone / 'requirements')
        for file in ('tools/setup_env.sh', 'setup.py', 'pyproject.toml'):
            (clone / file).parent.mkdir(exist_ok=True)
            shutil.copy(REPO / file, clone / file)
        return clone

    def add_command(self, name: str, text: str = '') -> None:
        (self.bin / name).write_text(f'#!{shutil.which("bash")}\n{text}\n')
        (self.bin / name).chmod(0o755)

    def add_gpu(self, *capabilities: str) -> None:
        self.add_command('nvidia-smi', f'printf "%s\\n" {" ".join(capabilities)}')

    def add_nvcc(self, version: str = '13.0') -> None:
        self.add_command('nvcc', f'echo "Cuda tools, release {version}, V{version}.88"')

    def start(self, *arguments: str, clone: Path | None = None) -> subprocess.Popen:
        self.log.write_text('')
        return subprocess.Popen(
            [(clone or self.clone) / 'tools/setup_env.sh', *arguments],
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # A shell in the background ignores Ctrl-C, and so does what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, code: int = 0, clone: Path | None = None) -> tuple[str, str]:
        """The outputs of a set-up that must end with this exit code."""
        process = self.start(*arguments, clone=clone)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, out + err
        return out, err

    def refusal(self, *arguments: str) -> str:
        """The last line of a set-up that does not install the stack."""
        _, err = self.run(*arguments, code=1)
        assert '--editable' not in self.log.read_text()
        *_, line = err.splitlines()
        assert line.startswith('setup_env: '), err
        return line

    def wheels(self) -> list[Path]:
        """All files in the cache, half-done ones included."""
        return [path for path in self.cache.rglob('*') if path.is_file()]

    def variants(self) -> list[str]:
        return sorted(wheel.parent.name.split('-', 2)[2] for wheel in self.wheels())

    def was_built(self) -> bool:
        return '-m pip wheel' in self.log.read_text()

    def was_installed(self) -> bool:
        return '--editable' in self.log.read_text()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def change_requirements(world):
    with (world.clone / 'requirements/tests.txt').open('a') as file:
        file.write('# more\n')


@pytest.mark.parametrize(
    'missing, complaint, package',
    [
        ('headers', 'c++ and /nowhere/Python.h', 'g++ python{}-dev'),
        ('libGL.so.1', 'OpenCV needs libGL.so.1', 'libgl1'),
        ('libgthread-2.0.so.0', 'OpenCV needs libgthread', 'libglib2.0-0'),
    ],
)
def test_missing_system_package(world, missing, complaint, package):
    world.environment['FAKE_MISSING'] = missing
    refusal = world.refusal()
    assert complaint in refusal
    assert refusal.endswith(f'; run: apt-get install {package.format(world.version)}')


def test_missing_compiler(world):
    (world.bin / 'c++').unlink()
    assert 'run: apt-get install g++' in world.refusal()


@pytest.mark.parametrize(
    'stack, version, supported',
    [
        ('onedl', '3.13', '3.10 or 3.11 or 3.12'),
        ('onedl', '3.9', '3.10 or 3.11 or 3.12'),
        ('upstream', '3.12', '3.10 or 3.11'),
        ('latest', '3.13', '3.10 or 3.11 or 3.12'),
    ],
)
def test_unsupported_python(world, stack, version, supported):
    world.environment['FAKE_VERSION'] = version
    assert f'the {stack} stack needs Python {supported}, which' in world.refusal(stack)


def test_absent_python(world):
    world.environment['PYTHON'] = 'python4'
    assert 'which python4 are not; set PYTHON' in world.refusal()


@pytest.mark.parametrize(
    'stack, torch, mmcv, constraints',
    [
        ('onedl', '2.11.0', 'onedl-mmcv==2.3.6', 'constraints-onedl.txt'),
        ('upstream', '2.1.2', 'mmcv==2.1.0', 'constraints-upstream.txt'),
        ('latest', '2.13.0', 'onedl-mmcv==2.3.6', 'constraints-onedl.txt'),
    ],
)
def test_each_stack_has_its_environment_and_versions(world, stack, torch, mmcv, constraints):
    world.environment |= {'PYTHON': 'python3', 'FAKE_VERSION': '3.11'}
    folder = '.venv' if stack == 'onedl' else f'.venv-{stack}'
    out, _ = world.run(stack)
    assert out.endswith(f'{world.clone / folder} is ready: the {stack} stack on Python 3.11\n')
    calls = world.log.read_text().splitlines()
    installations = [call for call in calls if '--python' in call]
    assert all(f'/{constraints} ' in call for call in installations)
    assert any(f' torch=={torch} ' in call for call in installations)
    assert any(f'/requirements/{stack}.txt ' in call for call in installations)
    (build,) = (call for call in calls if '-m pip wheel' in call)
    assert f' {mmcv}' in build


def test_unknown_stack(world):
    assert "no stack 'onedI'" in world.refusal('onedI')


def test_help(world):
    out, _ = world.run('--help')
    assert out.startswith('Usage: ') and 'MMTOKEN_CACHE' in out
    assert not (world.clone / '.venv').exists()


def test_set_up_once(world):
    out, _ = world.run()
    assert "==> Compiling mmcv's ops for cpu" in out and 'run on the CPU only' in out
    assert [wheel.name for wheel in world.wheels()] == [WHEEL] and world.variants() == ['cpu']
    installations = [line for line in world.log.read_text().splitlines() if '--python' in line]
    assert world.was_installed() and len(installations) == 4
    assert all('constraints-onedl.txt' in line for line in installations)  # torch stays pinned
    stamp = world.clone / '.venv/.stamp'
    written = stamp.stat().st_mtime_ns

    started = time.monotonic()
    out, err = world.run()
    assert time.monotonic() - started < 2
    assert out.count('\n') == 1 and 'is ready' in out and not err
    assert 'pip' not in world.log.read_text()
    assert stamp.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    'nvcc, variant, force_cuda',
    [('13.0', 'cuda13-8.0-9.0', 1), ('12.4', 'cpu', 0), (None, 'cpu', 0)],
)
def test_ops_for_the_gpu_need_a_gpu_and_its_compiler(world, nvcc, variant, force_cuda):
    world.add_gpu('9.0', '8.0', '9.0')
    if nvcc:
        world.add_nvcc(nvcc)
    out, _ = world.run()
    (wheel,) = world.wheels()
    assert wheel.parent.name == f'2.11.0-cp{world.version.replace(".", "")}-{variant}'
    assert f'FORCE_CUDA={force_cuda}' in world.log.read_text()
    assert ('CPU only' in out) == (variant == 'cpu')


def test_ops_are_compiled_anew_when_a_gpu_has_come(world):
    world.run()
    world.add_gpu('9.0')
    world.add_nvcc()
    world.run()
    assert world.was_built() and world.variants() == ['cpu', 'cuda13-9.0']
    world.run()
    assert not world.was_installed()


def test_ops_for_cuda_stay_where_there_is_no_gpu(world):
    world.add_gpu('9.0')
    world.add_nvcc()
    world.run()
    (world.bin / 'nvidia-smi').unlink()
    (world.bin / 'nvcc').unlink()
    world.run()
    assert not world.was_installed()

    change_requirements(world)
    world.run()
    assert world.was_installed() and not world.was_built() and world.variants() == ['cuda13-9.0']


@pytest.mark.parametrize(
    'architectures, variant',
    [('9.0', 'cuda13-9.0'), ('8.0;9.0', 'cuda13-8.0-9.0'), ('8.6 12.0+PTX', 'cuda13-8.6-12.0+PTX')],
)
def test_ops_for_another_machines_gpu(world, architectures, variant):
    world.run()
    world.add_nvcc()
    world.environment['TORCH_CUDA_ARCH_LIST'] = architectures
    world.run()
    assert world.variants() == ['cpu', variant]
    assert 'FORCE_CUDA=1' in world.log.read_text()

    del world.environment['TORCH_CUDA_ARCH_LIST']
    world.run()
    assert not world.was_installed()


def test_second_clone_takes_the_cached_wheel_without_a_compiler(world):
    world.run()
    (world.bin / 'c++').unlink()
    world.run(clone=world.add_clone('second'))
    assert world.was_installed() and not world.was_built()


def test_offered_wheel_spares_the_compiler(world):
    (world.bin / 'c++').unlink()
    (world.root / WHEEL).touch()
    world.environment['UV_FIND_LINKS'] = str(world.root)
    world.run()
    assert world.was_installed() and not world.was_built() and not world.wheels()


def test_wheel_for_another_torch(world):
    world.environment['FAKE_FAILURE'] = 'import torch, mmcv._ext'
    _, err = world.run(code=1)
    assert 'if it is mmcv, remove its wheel' in err
    world.run(code=1)
    assert world.was_installed()  # it is tried again: there is no stamp


def test_failed_build_shows_its_output(world):
    world.environment['FAKE_BUILD'] = 'fail'
    _, err = world.run(code=1)
    assert 'fatal error: out of cheese\n' in err
    assert not world.wheels() and not world.was_installed()


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_build(world, signum):
    """As by Ctrl-C: the signal goes to all processes of the set-up."""
    world.environment['FAKE_BUILD'] = 'hang'
    process = world.start()
    deadline = time.monotonic() + 60
    while len(world.wheels()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(world.wheels()) == 2, 'the build did not start'
    os.killpg(process.pid, signum)
    process.communicate(timeout=60)
    assert process.returncode

    del world.environment['FAKE_BUILD']
    world.run()
    assert [wheel.name for wheel in world.wheels()] == [WHEEL]
    assert not list(world.cache.glob('wheels/*/.build*'))


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
    change_requirements(world)
    world.run()
    assert world.was_installed() and extra.exists()


def test_broken_environment_is_remade(world):
    world.run()
    python = world.clone / '.venv/bin/python'
    python.unlink()
    python.symlink_to('/nowhere/python')
    world.run()
    assert world.was_installed()


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
