import json

import pytest


@pytest.mark.parametrize('train', [False, True])
def test_figures_agree(train, run, tmp_path):
    file = tmp_path / 'out' / 'sharing.json'
    args = ('--tokens', 9, 520, '--channels', 64, '--rounds', 2, '--json', file)
    result = run('benchmark_sharing', *args, *['--train'] * train)
    assert result.returncode == 0, result.stderr
    results = json.loads(file.read_text())
    assert results['train'] == train and results['heads'] == 1 and 'torch' in results['environment']
    for row, tokens in zip(results['pairs'], (9, 520), strict=True):
        own, others = 12 * tokens * 64**2 + 2 * tokens**2 * 64, tokens * 2 * 64**2 + tokens**2 * 64
        assert row['tokens'] == tokens
        assert row['mac_bound'] == pytest.approx(2 * own / (2 * own - others))
        assert row['map_mib'] == pytest.approx(4 * tokens**2 / 2**20)
        assert row['auto_keeps_map'] == (tokens == 9 or not train)
        times = row['round_ms']
        assert list(times) == ['dense', 'map', 'query_key', 'auto']
        assert row['dense_ms'] == pytest.approx(sum(times['dense']) / 2)
        for way, spread in row['speedup'].items():
            both = [a / b for a, b in zip(times['dense'], times[way], strict=True)]
            assert spread['median'] == pytest.approx(sum(both) / 2)
        assert f'{row["mac_bound"]:.3f}' in result.stdout
    assert ('query_key)' in result.stdout) == train
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_teaches(run):
    result = run('benchmark_sharing', '--help')
    assert result.returncode == 0
    assert 'MAC bound' in result.stdout and '--tokens 196 4096' in result.stdout


@pytest.mark.parametrize(
    'args, message',
    [
        (('--channels', 100), 'must be a multiple of 64'),
        (('--tokens', 0), 'must be 1 or more, got 0'),
    ],
)
def test_bad_arguments(args, message, run):
    result = run('benchmark_sharing', *args)
    assert result.returncode and message in result.stderr
