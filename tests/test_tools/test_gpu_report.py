"""The report for a GPU, as far as a CPU can run it; what it would do on a GPU, with stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from gpu_reporting import machine, measure, schedule
from gpu_reporting.cases import Case, list_cases
from gpu_reporting.costs import compare_costs, equal_cost_shape
from gpu_reporting.kernels import KERNELS
from gpu_reporting.measure import Bench, relative_error
from gpu_reporting.networks import MAIN, NETWORKS
from gpu_reporting.record import Record
from gpu_reporting.schedule import Schedule
from gpu_reporting.table import WIDTH, make_table
from rich.console import Console

from mmtoken.analysis.twin import our_class

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device('cpu')
CASE = Case('forward', 'STViTRSwin', 'tiny', 'float32', 1)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """Stand-ins hold no memory, and it takes long to release it."""
    monkeypatch.setattr(schedule, 'release_memory', lambda: None)


# What is measured


def test_every_backbone_is_measured():
    assert set(NETWORKS) == set(FAMILIES)
    for name, network in NETWORKS.items():
        cls = our_class(dict(type=f'mmtoken.{name}'))
        assert network.chooses == FAMILIES[name].chooses
        assert set(network.routing) == ({cls.ratio_name} if cls.ratio_name else set())
        assert set(network.sizes) <= set(cls.arch_zoo)
        assert network.sizes[0] == 'small'


@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_order_of_cases(device, quick):
    cases = list_cases(device, quick)
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names)
    first = cases[: len(MAIN)]
    assert [case.name for case in first] == list(MAIN)
    assert {(case.kind, case.dtype) for case in first} == {('forward', 'bfloat16')}
    kinds = list(dict.fromkeys(case.kind for case in cases))
    expected = ['forward', 'parity', 'training', 'captured', *KERNELS, 'compiled']
    if device == 'cpu':
        expected = ['forward', 'parity', 'training', *KERNELS]
    assert kinds == expected
    assert not any(NETWORKS[case.name].chooses for case in cases if case.kind == 'captured')
    assert {case.size for case in cases} >= ({'tiny'} if quick else {'small', 'base', 'medium'})
    assert ('varlen kernel' in {case.name for case in cases}) == (device == 'cuda')


def test_images_of_equal_cost():
    def cost(shape):
        return shape[0] * shape[1]

    assert equal_cost_shape(cost, 800 * 1280, (800, 1280)) == (800, 1280)
    assert equal_cost_shape(cost, 400 * 640, (800, 1280)) == (384, 608)
    assert equal_cost_shape(cost, 1, (800, 1280)) == (32, 64)
    assert equal_cost_shape(cost, 700 * 700, (1024, 1024)) == (704, 704)


def test_costs():
    shape = (128, 192)
    costs = compare_costs('DGEPVT', 'tiny', shape, CPU)
    sparse, twin, lower = (costs[name]['macs'] for name in ('sparse', 'twin', 'lower'))
    assert costs['sparse']['shape'] == costs['twin']['shape'] == list(shape)
    assert sparse < twin and abs(lower - sparse) < abs(twin - sparse)
    assert 'lower' not in compare_costs('SWATSwin', 'tiny', shape, CPU)


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('batch_size', [1, 3])
def test_forms_of_a_kernel_agree(kernel, batch_size):
    pytest.importorskip('torch.nn.attention.flex_attention', reason='torch before 2.5')
    forms = {name: form for name, form in KERNELS[kernel].items() if form.on_cpu}
    outs = [form.prepare('tiny', batch_size, CPU, torch.float32)() for form in forms.values()]
    for out in outs:
        torch.testing.assert_close(out, outs[0], atol=1e-4, rtol=1e-4)


@pytest.fixture
def once(monkeypatch):
    """Steps are not repeated."""
    monkeypatch.setattr(measure, 'time_in_turn', lambda steps, *args: dict.fromkeys(steps, [2.0]))


def test_measuring(once):
    bench = Bench(CPU, quick=True)
    forward = bench.measure(Case('forward', 'DGEPVT', 'tiny', 'bfloat16', 2))
    assert forward['ms'] == dict(sparse=2, twin=2, lower=2) and forward['speedup'] == 1
    assert forward['realised'] == 1 / forward['mac_ratio'] < 1
    assert forward['host_reads'] == dict(tolist=4)
    training = bench.measure(Case('training', 'SWATSwin', 'tiny', 'bfloat16', 2))
    assert set(training['ms']) == {'sparse', 'twin'} and 'host_reads' not in training
    assert bench.measure(Case('parity', 'MSViT', 'tiny', 'float32', 1)) == dict(error=0)
    assert 0 < bench.measure(Case('parity', 'MSViT', 'tiny', 'bfloat16', 1))['error'] < 0.1
    kernel = bench.measure(Case('packed', 'padded', 'tiny', 'float32', 2))
    assert kernel['error'] < 1e-5 and kernel['ms'] == dict(sparse=2)


def test_wrong_maps_fail(monkeypatch):
    monkeypatch.setattr(measure, 'relative_error', lambda given, expected: 0.05)
    bench = Bench(CPU, quick=True)
    assert bench.measure(Case('parity', 'PSViT', 'tiny', 'bfloat16', 1)) == dict(error=0.05)
    with pytest.raises(ValueError, match='differ by 5.0e-02 .* above 1e-03'):
        bench.measure(Case('parity', 'PSViT', 'tiny', 'float32', 1))
    assert bench.measure(Case('parity', 'MergeViT', 'tiny', 'float32', 1)) == dict(error=0.05)


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1


# Order and time


class Clock:
    """Time passes only while cases run, as many seconds as their images."""

    now = 100.0

    def __call__(self):
        return self.now

    def measure(self, case):
        self.now += case.batch_size
        if case.name == 'bad':
            raise RuntimeError('out of\n memory')
        return dict(ms=case.batch_size)


def run_for(seconds, *cases):
    clock, results = Clock(), {}
    plan = Schedule(seconds, clock.measure, lambda case, r: results.update({case: r}), clock)
    plan.run(cases)
    return results, plan.left_out


def case(kind, name, seconds):
    return Case(kind, name, 'tiny', 'float32', seconds)


def test_time_is_kept():
    """The dearest case of its kind so far must fit; cheaper kinds go on."""
    done = [case('forward', 'a', 4), case('forward', 'b', 1), case('parity', 'c', 1)]
    dear, cheap = case('forward', 'd', 1), case('parity', 'e', 1)
    results, left_out = run_for(10, *done, dear, cheap)
    assert list(results) == [*done, cheap] and left_out == [dear]
    results, left_out = run_for(11, *done, dear, cheap)
    assert list(results) == [*done, dear, cheap] and not left_out


def test_first_cases_of_dear_kinds_are_guessed(monkeypatch):
    monkeypatch.setitem(schedule.FIRST_GUESS, 'compiled', 20)
    first, second = (case('compiled', name, 3) for name in 'ab')
    assert run_for(20, first) == ({}, [first])
    results, left_out = run_for(21, first, second)
    assert list(results) == [first, second] and not left_out


def test_no_time():
    assert run_for(0, CASE) == ({}, [CASE])


def test_a_failing_case_is_recorded_and_the_next_follows():
    bad, good = case('forward', 'bad', 1), case('forward', 'good', 1)
    results, left_out = run_for(9, bad, good)
    assert results == {bad: dict(failed='RuntimeError: out of memory'), good: dict(ms=1)}
    assert not left_out


def test_a_lost_gpu_ends_the_report(monkeypatch):
    def lost():
        raise RuntimeError('an illegal memory access was encountered')

    monkeypatch.setattr(schedule, 'release_memory', lost)
    cases = [case('forward', name, 1) for name in ('bad', 'a', 'b')]
    results, left_out = run_for(9, *cases)
    assert list(results) == cases[:1] and left_out == cases[1:]


# The file


def test_resume(tmp_path):
    path, setup = tmp_path / 'new' / 'gpu.json', dict(quick=True, environment=dict(torch='2'))
    other = case('parity', 'MSViT', 1)
    record = Record(path, setup)
    assert record.missing([CASE, other]) == [CASE, other] and not path.exists()
    record.add(CASE, dict(ms=1))
    assert json.loads(path.read_text()) == setup | dict(cases={str(CASE): dict(ms=1)})
    with pytest.raises(FileExistsError, match='--resume'):
        Record(path, setup)
    resumed = Record(path, setup, resume=True)
    assert resumed.missing([CASE, other]) == [other]
    resumed.add(other, dict(error=0))
    assert list(json.loads(path.read_text())['cases']) == [str(CASE), str(other)]
    resumed.add(CASE, dict(failed='out of memory'))
    assert resumed.missing([CASE, other]) == [CASE]  # once more
    with pytest.raises(ValueError, match=r"environment: \{'torch': '2'\}, now \{'torch': '3'\}"):
        Record(path, dict(setup, environment=dict(torch='3')), resume=True)
    path.write_text('[]')
    with pytest.raises(ValueError, match='no report'):
        Record(path, setup, resume=True)


def test_a_gpu_is_described(monkeypatch):
    class Properties:
        multi_processor_count, total_memory, major, minor = 132, 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: Properties)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Card 100')
    monkeypatch.setattr(machine, '_driver', lambda: '580.1')
    setup = machine.describe_setup(torch.device('cuda'), quick=False)
    assert setup['environment']['device'] == 'Card 100' and 'date' not in setup['environment']
    assert setup['gpu'] == dict(
        cuda=torch.version.cuda, driver='580.1', multiprocessors=132, memory_mb=81920,
        capability='9.0',
    )  # fmt: skip


def test_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    assert machine._driver() is None


# The table


def test_table():
    parity, kernel, failed, absent = (
        Case('parity', 'MSViT', 'small', 'bfloat16', 1),
        Case('packed', 'padded', 'small', 'bfloat16', 8),
        Case('forward', 'MSViT', 'base', 'bfloat16', 8),
        Case('forward', 'PSViT', 'small', 'bfloat16', 8),
    )
    results = {
        str(CASE): dict(
            ms=dict(sparse=12.34, twin=24.68, lower=13.0), speedup=2.0, mac_ratio=2.5, realised=0.8,
            peak_mb=dict(sparse=456.7), host_reads=dict(synchronization=3),
        ),
        str(parity): dict(error=0.0123),
        str(kernel): dict(error=2e-4, ms=dict(sparse=0.5)),
        str(failed): dict(failed='OutOfMemoryError: CUDA out of memory'),
    }  # fmt: skip
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(make_table([CASE, parity, kernel, failed, absent], results))
    rows = [' '.join(line.split()) for line in captured.get().splitlines() if 'float' in line]
    assert rows == [
        'STViTRSwin tiny forward, float32 x 1 12.3 24.7 13.0 2.00 2.50 0.80 457 3',
        'MSViT small parity, bfloat16 x 1 1e-02',
        'padded small packed, bfloat16 x 8 0.50 2e-04',
        'MSViT base forward, bfloat16 x 8 failed',
    ]


# The tool


@pytest.fixture
def report(run, monkeypatch):
    """The tool in this process; a stand-in measures its cases."""

    def stand_in(self, case):
        if case.name == 'MergeViT' and case.kind == 'parity':
            raise ValueError('out of cheese')
        return dict(error=0.5)

    monkeypatch.setattr(Bench, 'measure', stand_in)
    return lambda *args: run('gpu_report', '--device', 'cpu', '--quick', *args)


def test_cases_are_listed(report):
    result = report('--list')
    assert result.returncode == 0
    assert result.stdout.splitlines() == list(map(str, list_cases('cpu', quick=True)))
    chosen = report('--list', '--networks', 'MSViT').stdout.splitlines()
    assert chosen and all('MSViT' in line for line in chosen)


def test_failures_time_and_resuming(report, tmp_path):
    path = tmp_path / 'gpu.json'
    result = report(path, '--networks', 'MSViT', 'PSViT', '--minutes', 0)
    assert result.returncode == 0 and not path.exists()
    assert 'Left out, 12 cases' in ' '.join(result.stdout.split())
    assert report(path, '--networks', 'MSViT').returncode == 0
    assert len(json.loads(path.read_text())['cases']) == 6
    result = report(path, '--networks', 'MSViT')
    assert result.returncode == 1 and '--resume' in result.stderr
    result = report(path, '--networks', 'MSViT', 'MergeViT', '--resume')
    assert result.returncode == 1 and 'ValueError: out of cheese' in result.stderr
    assert len(json.loads(path.read_text())['cases']) == 12
    assert '5e-01' in result.stdout and 'failed' in result.stdout


def test_refusals(report, run, tmp_path):
    assert 'no network Swin; known are STViTRSwin' in report('--networks', 'Swin').stderr
    assert 'give a FILE' in report().stderr
    if not torch.cuda.is_available():
        result = run('gpu_report', tmp_path / 'gpu.json')
        assert result.returncode == 1 and 'sees no CUDA device' in result.stderr


def test_without_the_libraries(tmp_path):
    """In a process that cannot import them, measured in earnest."""
    path, names = tmp_path / 'gpu.json', ('STViTRSwin', 'MSViT')
    folders = Path(__file__).parent / 'fakes' / 'blocked', ROOT
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, folders)),
        BLOCKED='mmcv mmdet mmseg mmpretrain pycocotools',
        MMTOKEN_SKIP_STACK_CHECK='1',  # the distributions are there
    )
    tool = ROOT / 'tools' / 'analysis' / 'gpu_report.py'
    result = subprocess.run(
        [sys.executable, tool, path, '--device', 'cpu', '--quick', '--networks', *names],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    cases = json.loads(path.read_text())['cases']
    assert list(cases) == [str(c) for c in list_cases('cpu', quick=True) if c.name in names]
    forward = cases['forward: STViTRSwin tiny, bfloat16 x 2']
    assert forward['host_reads'] == {} and forward['ms']['twin'] > 0
    assert 'STViTRSwin' in result.stdout and 'Left out' not in result.stdout
    code = 'import mmcv'
    blocked = subprocess.run([sys.executable, '-c', code], capture_output=True, env=environment)
    assert b"No module named 'mmcv'" in blocked.stderr
