import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtoken.checkpoints.load import load_into
from mmtoken.registry import MODELS

STUDY = Path(__file__).resolve().parents[2] / 'benchmarks' / 'study'
NAMES = ('rows', 'run', 'summaries', 'measure', 'plot', 'budgets', 'plot_budgets', 'gates')
# One iteration from scratch, in this process
SHORT = [
    '--cfg-options', 'model.backbone.init_cfg=None', 'train_cfg.max_iters=1',
    *(
        f'{part}_dataloader.{name}={value}'
        for part in ('train', 'test')
        for name, value in (('num_workers', 0), ('persistent_workers', False))
    ),
]  # fmt: skip


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Modules of the study, whose results and work directories are in a folder of the test."""
    monkeypatch.syspath_prepend(str(STUDY))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in NAMES}
    for name in ('rows', 'summaries', 'measure', 'budgets', 'plot_budgets'):
        monkeypatch.setattr(modules[name], 'RESULTS', tmp_path / 'results')
    monkeypatch.chdir(tmp_path)
    return modules


def test_rows_build_on_others(study):
    rows = study['rows'].read_rows('ccp')
    assert rows['msvit_12'].config == rows['msvit'].config != rows['dense'].config
    assert rows['msvit_12'].load(0).model.backbone.gate.fine_ratio == 0.12
    assert rows['msvit'].load(0).model.backbone.gate.fine_ratio == 0.25


def make_summary(study, name, ms, score):
    return study['summaries'].Summary(
        name, [0], {'mIoU': [score - 1, score + 1]}, None, dict(ms=dict(median=ms)), None
    )


def test_points_above_the_line(study):
    made = [
        make_summary(study, *row)
        for row in [
            ('dense', 400, 50), ('dense_2', 200, 40), ('dense_1', 100, 20), ('fast', 150, 33),
            ('slow', 500, 60), ('uniform-28', 300, 41),
        ]
    ]  # fmt: skip
    above = {s.name: study['summaries'].above_line(s, made, 'mIoU') for s in made}
    assert above['fast'] == pytest.approx(3) and above['uniform-28'] == pytest.approx(-4)
    assert above['dense_2'] is None and above['slow'] is None  # on the line; beyond it


def test_rows_are_compared_with_the_seeds_that_all_have(study):
    made = [
        study['summaries'].Summary(name, seeds, {'mIoU': scores}, None, None, None)
        for name, seeds, scores in (('dense', [0, 2], [40, 44]), ('fast', [0, 1, 2], [41, 60, 45]))
    ]
    shared = study['summaries'].with_shared_seeds(made)
    assert [(s.seeds, s.scores['mIoU']) for s in shared] == [([0, 2], [40, 44]), ([0, 2], [41, 45])]
    late = study['summaries'].Summary('late', [1], {'mIoU': [50]}, None, None, None)
    assert study['summaries'].with_shared_seeds([*made, late]) == shared


def test_seeds_are_compared_one_by_one(study):
    module = study['summaries']
    made = [
        module.Summary(name, seeds, {'mIoU': scores}, None, dict(ms=dict(median=ms)), None)
        for name, seeds, scores, ms in [
            ('dense', [0, 1], [50, 60], 400),
            ('dense_1', [0, 1], [40, 44], 200),
            ('dense_2', [0], [90], 300),  # the line of two seeds leaves it out
            ('fast', [0, 1], [46, 53], 300),
            ('slow', [0, 1], [51, 59], 500),  # beyond the line
            ('eomt', [1, 2], [9, 9], 300),
            ('eomt_dense', [0, 1], [7, 8], 300),
            ('eomt_50', [0, 1], [9, 9], 300),
        ]
    ]
    by_name = {s.name: s for s in made}
    twin, line = module.above_twin_by_seed, module.above_line_by_seed
    assert twin(by_name['fast'], made, 'mIoU') == [-4, -7]
    assert twin(by_name['eomt'], made, 'mIoU') == [1]
    assert twin(by_name['eomt_50'], made, 'mIoU') == [2, 1]
    assert line(by_name['fast'], made, 'mIoU') == pytest.approx([1, 1])
    for dense in ('dense', 'dense_1', 'eomt_dense'):
        assert twin(by_name[dense], made, 'mIoU') == []
    assert line(by_name['dense'], made, 'mIoU') == line(by_name['slow'], made, 'mIoU') == []


def test_bars_leave_out_what_a_seed_moves_in_all_rows(study):
    made = [
        study['summaries'].Summary(name, [0, 1], {'mIoU': scores}, None, None, None)
        for name, scores in (('dense', [40, 50]), ('fast', [41, 53]))
    ]
    deviations = study['plot'].deviations_within_seeds(made, 'mIoU')
    assert deviations == pytest.approx(dict(dense=0.5**0.5, fast=0.5**0.5))
    one = study['summaries'].with_shared_seeds(made, {1})
    assert [s.scores['mIoU'] for s in one] == [[50], [53]]
    assert study['plot'].deviations_within_seeds(one, 'mIoU') == {}


def test_nothing_has_no_shared_seeds(study):
    assert study['summaries'].with_shared_seeds([]) == []


def write_ccp(folder):
    rng = np.random.default_rng(0)
    for part, number in (('train', 3), ('test', 2)):
        for kind, suffix, mode in (('images', 'jpg', 'RGB'), ('labels', 'png', 'L')):
            (folder / kind / part).mkdir(parents=True)
            for i in range(number):
                shape = (90, 60, 3) if mode == 'RGB' else (90, 60)
                pixels = rng.integers(0, 255 if mode == 'RGB' else 13, shape, dtype=np.uint8)
                Image.fromarray(pixels, mode).save(folder / kind / part / f'{i}.{suffix}')


def test_a_row_is_trained_tested_measured_and_drawn(study, tmp_path, monkeypatch, capsys):
    write_ccp(tmp_path / 'data' / 'ccp')
    monkeypatch.setattr(sys, 'argv', ['run.py', 'ccp', 'dense_420x280', *SHORT])
    assert study['run'].main() == 0
    result = tmp_path / 'results' / 'ccp' / 'dense_420x280_seed0.json'
    first = json.loads(result.read_text())
    assert {'mIoU', 'boundary/mIoU'} <= first['scores'].keys() and first['size'] == [420, 280]
    assert study['run'].main() == 0  # does nothing
    assert 'delete it to repeat' in capsys.readouterr().out

    monkeypatch.setattr(sys, 'argv', ['measure.py', 'ccp', '--photos', '1', '--rounds', '1'])
    assert study['measure'].main() == 0
    (summary,) = study['summaries'].summarize('ccp')
    assert summary.scores['mIoU'] == [first['scores']['mIoU']]
    cost = summary.cost
    assert 0 < cost['backbone_ms']['median'] < cost['ms']['median']
    assert cost['gmacs']['mean'] == pytest.approx(16, rel=0.1)  # 601 tokens
    in_batches = ['--batch-size', '2', '--photos', '3', '--rounds', '1']
    monkeypatch.setattr(sys, 'argv', ['measure.py', 'ccp', '--rows', 'dense_420x280', *in_batches])
    assert study['measure'].main() == 0
    batches = json.loads((tmp_path / 'results' / 'ccp' / 'cost_batch2.json').read_text())
    assert batches['photos'] == 2
    for rows, message in ((['dens'], 'no checkpoint in .* of dens'), (['dense_420x280'], 'lost')):
        if message == 'lost':
            other = dict(batches, rows=dict(batches['rows'], dense={}))
            (tmp_path / 'results' / 'ccp' / 'cost_batch2.json').write_text(json.dumps(other))
        argv = ['measure.py', 'ccp', *in_batches, '--rows', *rows]
        monkeypatch.setattr(sys, 'argv', argv)
        with pytest.raises(SystemExit, match=message):
            study['measure'].main()
    of_two = batches['rows']['dense_420x280']['gmacs']['mean']
    assert of_two == pytest.approx(cost['gmacs']['mean'], rel=0.01)  # for one photograph
    add_a_row_beside(study, tmp_path, monkeypatch)
    out = tmp_path / 'plot.svg'
    study['plot'].draw([summary], out)
    drawn = out.read_text()
    assert '420×280' in drawn and 'boundary mIoU' in drawn
    study['plot'].draw([summary], out)
    assert out.read_text() == drawn
    pair = [replace(summary, name=name) for name in ('swat', 'swat_dense')]
    assert study['plot'].twins([summary, *pair]) == [tuple(pair)]
    study['plot'].draw(pair, out)  # without other resolutions
    assert 'swat_dense' in out.read_text()


def add_a_row_beside(study, tmp_path, monkeypatch):
    """Times of a row that comes later are scaled to those of before."""
    old, new = 'dense_420x280', 'dense_504x336'
    work_dirs, results = tmp_path / 'work_dirs' / 'study' / 'ccp', tmp_path / 'results' / 'ccp'
    shutil.copytree(work_dirs / f'{old}_seed0', work_dirs / f'{new}_seed0')
    shutil.copy(results / f'{old}_seed0.json', results / f'{new}_seed0.json')
    before = json.loads((results / 'cost.json').read_text())
    of_old = before['rows'][old]

    def now(key, factor):
        return {k: v and factor * v for k, v in of_old[key].items()}

    slow = {key: now(key, 2) for key in ('ms', 'ms_by_batch', 'backbone_ms')}
    slower = {key: now(key, 6) for key in slow}
    rows = {old: of_old | slow, new: of_old | slower}  # on a machine that is half as fast
    monkeypatch.setattr(study['measure'], 'measure', lambda *args: dict(before, rows=rows))
    argv = ['measure.py', 'ccp', '--photos', '1', '--rounds', '1', '--rows']
    for options, message in (
        ([new, '--beside', 'dense'], 'has no such row'),
        ([new, '--beside', old], 'give it with the new ones'),
        ([old, new, '--beside', old, '--photos', '2'], 'photos 1, not 2'),
    ):
        monkeypatch.setattr(sys, 'argv', [*argv, *options])
        with pytest.raises(SystemExit, match=message):
            study['measure'].main()
    monkeypatch.setattr(sys, 'argv', [*argv, old, new, '--beside', old])
    assert study['measure'].main() == 0
    after = json.loads((results / 'cost.json').read_text())
    assert list(after['rows']) == [old, new] and after['rows'][old] == of_old
    added = after['rows'][new]
    assert added['ms']['median'] == pytest.approx(3 * of_old['ms']['median'])
    assert added['gmacs'] == of_old['gmacs'] and added['beside']['row'] == old
    with pytest.raises(SystemExit, match=f'has {new} already'):
        study['measure'].main()


def test_budgets_of_one_checkpoint(study, tmp_path, monkeypatch):
    write_ccp(tmp_path / 'data' / 'ccp')
    row = replace(study['rows'].read_rows('ccp')['msvit'], size=(168, 112))
    for name in ('run', 'budgets'):
        monkeypatch.setattr(study[name], 'read_rows', lambda task: dict(msvit=row))
    monkeypatch.setattr(sys, 'argv', ['run.py', 'ccp', 'msvit', *SHORT])
    assert study['run'].main() == 0
    few = ['--photos', '1', '--rounds', '1', *SHORT]
    monkeypatch.setattr(sys, 'argv', ['budgets.py', 'ccp', 'msvit', '--tokens', '0.5', '1', *few])
    assert study['budgets'].main() == 0
    file = tmp_path / 'results' / 'ccp' / 'budgets_msvit.json'
    budgets = json.loads(file.read_text())['budgets']
    assert list(budgets) == ['0.5', '1.0']
    assert budgets['0.5']['gmacs'] < 0.7 * budgets['1.0']['gmacs']
    assert 'boundary/mIoU' in budgets['0.5']['scores']

    monkeypatch.setattr(study['budgets'], 'test', lambda *args: dict(mIoU=1.0))
    monkeypatch.setattr(sys, 'argv', ['budgets.py', 'ccp', 'msvit', '--tokens', '0.3', *few])
    assert study['budgets'].main() == 0  # tests what is new alone
    again = json.loads(file.read_text())['budgets']
    assert list(again) == ['0.3', '0.5', '1.0'] and again['0.3']['scores'] == dict(mIoU=1.0)
    assert again['0.5']['scores'] == budgets['0.5']['scores']


@pytest.mark.parametrize('warm_start', (False, True))
def test_gates_find_the_regions_whose_labels_change(study, warm_start):
    gates, photos = study['gates'], []
    for seed in range(8):
        torch.manual_seed(seed)
        deviation = torch.rand(6, 8, 1)
        seen = dict(deviation=deviation, patches=torch.cat([deviation, torch.rand(6, 8, 3)], -1))
        photos.append((seen, 1 - (deviation[..., 0] > 0.8).float()))
    plain = gates.Setting('plain', input='deviation')
    assert gates.coverage(gates.train_gate(plain, photos, 0), plain, photos)[0] > 0.9
    new = gates.Setting('new', kernel_size=1, iterations=0)
    taught = gates.Setting('taught', kernel_size=1, iterations=60, warm_start=warm_start)
    before, after = (
        gates.coverage(gates.train_gate(setting, photos, 0), setting, photos)[0]
        for setting in (new, taught)
    )
    assert before < 0.6 and after > 0.9


def test_an_unknown_row_is_named(study, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['run.py', 'ccp', 'dens'])
    with pytest.raises(SystemExit, match=r"no row 'dens'; it has dense, "):
        study['run'].main()


def test_curve_of_budgets(study, tmp_path, monkeypatch, capsys):
    (tmp_path / 'docs' / 'images').mkdir(parents=True)
    monkeypatch.setattr(study['plot_budgets'], 'ROOT', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['plot_budgets.py', 'ccp'])
    with pytest.raises(SystemExit, match='no budgets of ccp are known: .*budgets.py ccp ROW'):
        study['plot_budgets'].main()
    folder = tmp_path / 'results' / 'ccp'
    folder.mkdir(parents=True)
    scores = {'mIoU': 40.0, 'boundary/mIoU': 24.0}
    (folder / 'dense_seed1.json').write_text(json.dumps(dict(scores=scores)))
    budgets = {'0.3': dict(scores=scores), '1.0': dict(scores=scores)}
    for row in ('msvit', 'dge'):
        content = dict(row=row, seed=1, budgets=budgets)
        (folder / f'budgets_{row}.json').write_text(json.dumps(content))
    assert study['plot_budgets'].main() == 0
    drawn = (tmp_path / 'docs' / 'images' / 'budgets_ccp.svg').read_text()
    assert all(word in drawn for word in ('msvit', 'dge', 'dense, seed 1', 'boundary mIoU'))
    assert 'docs/images/budgets_ccp.svg' in capsys.readouterr().out


SMALL = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


@pytest.mark.parametrize(
    'variant, base, args',
    [
        ('LearnedMergeMSViT', 'MSViT', dict(gate=dict(input='patches', fine_ratio=0.25))),
        ('DetailMSViT', 'MSViT', dict(gate=dict(input='patches', fine_ratio=0.25))),
        ('InterpolatedDGEDeiT', 'DGEDeiT', dict(router=dict(query_ratio=0.5), frozen_stages=1)),
    ],
)
def test_a_variant_starts_as_its_backbone_and_learns(study, tmp_path, variant, base, args):
    made, plain = (
        MODELS.build(dict(type=name, arch=SMALL, cls_token=True, **args)).eval()
        for name in (variant, f'mmtoken.{base}')
    )
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    new = load_into(made, tmp_path / 'weights.pth').newly_initialized
    assert new
    x = torch.rand(2, 3, 80, 112)
    assert torch.allclose(made(x)[0], plain(x)[0], atol=1e-6)
    made(x)[0].square().sum().backward()
    parameters = dict(made.named_parameters())
    assert all(parameters[name].grad.any() for name in new)


def test_fewer_layers_end_with_the_norm(study):
    args = dict(type='FewerLayersMSViT', arch=SMALL, gate=None)
    x = torch.rand(1, 3, 32, 32)
    full, fewer = (MODELS.build(dict(args, out_indices=[i])).eval() for i in (2, 1))
    assert len(fewer.blocks) == 2
    fewer.norm.weight.data.fill_(0)
    fewer.norm.bias.data.fill_(3)
    assert torch.equal(fewer(x)[0], torch.full((1, 32, 2, 2), 3.0))
    assert full(x)[0].shape == fewer(x)[0].shape
