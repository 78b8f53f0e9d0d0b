"""Fill in the tables of the pages from committed measurements, or check that they are fresh."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
import yaml

from mmtoken.analysis.spread import spread
from mmtoken.analysis.training_log import METRICS
from mmtoken.models import find_model, list_models

DESCRIPTION = """\
Write the generated tables of README.md, docs/, benchmarks/ and configs/*/README.md. A table stands
between two comments, the first of which names it and the files it shows:

  <!-- table: speed msvit* -->
  <!-- end -->

  choice            the methods, for the README
  machines          the same speed-ups on other machines, benchmarks/{machines,reported}
  speed [GLOB]      benchmarks/GLOB.json, of tools/analysis/benchmark.py
  profiles          benchmarks/profiles, of tools/analysis/benchmark.py --profile
  compiled          benchmarks/compiled, of the same with and without --compile
  macs [GLOB]       benchmarks/macs/GLOB.json, of tools/analysis/flops.py
  memory [GLOB]     benchmarks/high_resolution/GLOB.json, of tools/analysis/flops.py --memory
  scores [GLOB]     benchmarks/shapes/GLOB.json, of tools/analysis/compare.py
  models            what every backbone of mmtoken.list_models() returns
  networks FOLDER   parameters and MACs in configs/FOLDER/metafile.yml
  published         results that authors published, in all metafiles
  study TASK        benchmarks/study/results/TASK, of benchmarks/study/run.py and measure.py
  seeds TASK        the same, seed by seed
  batches TASK      the same, cost.json and cost_batchN.json: speed-ups in batches
  gates TASK        benchmarks/study/results/TASK/gates.json, of benchmarks/study/gates.py
  budgets TASK/ROW  benchmarks/study/results/TASK/budgets_ROW.json, of benchmarks/study/budgets.py
  zoo               what we have trained ourselves, config by config
"""
ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / 'benchmarks'
MARK = re.compile(r'(<!-- table: (?P<name>\S+) ?(?P<argument>\S*) -->\n).*?(<!-- end -->)', re.S)
SIZES = ('t', 's', 'm', 'b', 'base32')  # in this order
DATA = ('COCO', 'ADE20K', 'Cityscapes', 'ImageNet-1k', 'Data Science Bowl 2018')  # in this order
SHORT = dict(tiny='t', small='s', medium='m', base='b')
# Rows of the README's first table: what the user has, folder and name of the method, what it does
# to tokens, what else it costs; files of timings and of scores, with what was measured.
CHOICE = (
    ('Swin; any task', 'stvit_r', 'STViT-R', 'each window of 49 becomes 9',
     'ImageNet weights of its own: released for small and base',
     {'stvit-r-swin-s_forward_800x1280_run*': 'small'}, {'stvit-r': ''}),
    ('plain DeiT; speed first', 'stvit_deit', 'STViT', '4×4 become 1, attention is global',
     'score not measured; pretrain on ImageNet',
     {'stvit-deit-s_forward_800x1280_run*': 'small'}, {}),
    ('PVT or DeiT; images with large quiet areas', 'dge', 'DGE',
     'in every block, 16 of a region become 16, 4 or 1', 'a budget loss',
     {'dge-pvt-s_forward_800x1280_run*': 'PVT small, 0.436 of the queries'}, {'dge': ''}),
    ('plain ViT: DeiT, MAE, DINOv2', 'msvit', 'MSViT',
     'at the input, 4 of a region stay or become 1', 'a gate loss',
     {'msvit-s_forward_1x1024x1024_run*': 'small, half of the regions coarse'}, {'msvit': ''}),
    ('any weights of a plain ViT; no training', 'merge', 'MPM',
     'pairs of alike tokens become one, twice', 'score not measured',
     {'merge-vit-s_forward_1x1024x1024_run*': 'small; depends on the image'}, {}),
    ('time to train from scratch', 'psvit', 'PSViT', 'pooled twice; layers share attention maps',
     'no pretrained weights', {'psvit-t_forward_800x1280_run*': 'tiny'}, {'psvit': ''}),
    ('time to spend on accuracy', 'swat', 'SWAT', 'all stay and keep their spatial structure',
     'no weights released',
     {'swat-swin-t_forward_800x1280_run*': 'Swin tiny',
      'swat-deit-s_forward_800x1280_run*': 'DeiT small'},
     {'swat-swin': 'Swin', 'swat-deit': 'DeiT'}),
)  # fmt: skip


def main() -> int:
    """Write or check all pages; return 0, or 1 if --check found an old table."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='name pages that are old, write none')
    check = parser.parse_args().check
    old = [page for page in pages() if fill(page.read_text()) != page.read_text()]
    for page in old:
        print(
            f'{page.relative_to(ROOT)}: {"old; run tools/docs/tables.py" if check else "written"}'
        )
        if not check:
            page.write_text(fill(page.read_text()))
    return 1 if check and old else 0


def pages() -> list[Path]:
    """All pages that may hold tables."""
    globs = ('README.md', 'docs/*.md', 'benchmarks/**/README.md', 'configs/*/README.md')
    return [page for glob in globs for page in sorted(ROOT.glob(glob))]


def fill(text: str) -> str:
    """A page with its tables generated again.

    Raises:
        KeyError: A table has a name that is not in TABLES.
    """
    return MARK.sub(lambda m: m[1] + TABLES[m['name']](*filter(None, [m['argument']])) + m[4], text)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; columns after the first that hold figures alone are aligned to the right."""
    header, rows = list(header), [list(row) for row in rows]
    if not rows:
        raise ValueError(f'no rows for the table of {header}')
    figures = [
        all(re.match(r'[\d−+.][^×]*$|$', row[i]) for row in rows) for i in range(len(header))
    ]
    rule = ['---:' if right and i else '---' for i, right in enumerate(figures)]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in (header, rule, *rows))


def read(folder: Path, glob: str) -> dict[str, dict]:
    """JSON files by name.

    Raises:
        ValueError: There are none.
    """
    files = sorted(folder.glob(f'{glob}.json'), key=lambda path: size_key(path.stem))
    if not files:
        raise ValueError(f'no {folder.relative_to(ROOT)}/{glob}.json')
    return {path.stem: json.loads(path.read_text()) for path in files}


def size_key(name: str) -> tuple[str, int, str]:
    """Order networks by name, and the sizes of one network from small to large."""
    *rest, size = name.split('_')[0].split('-')
    return ('-'.join(rest), SIZES.index(size), name) if size in SIZES else (name, 0, name)


def choice() -> str:
    """The methods, for the README."""
    rows = []
    for have, folder, method, tokens, costs, timings, comparisons in CHOICE:
        gains = [f'{speedups(glob)}× ({what})' for glob, what in timings.items()]
        points = [
            ' '.join(filter(None, [what, *differences(read(BENCHMARKS / 'shapes', name)[name])]))
            for name, what in comparisons.items()
        ]
        rows.append(
            (have, f'[{method}](configs/{folder})', tokens, ', '.join(gains) or '–',
             '; '.join([*points, costs]))
        )  # fmt: skip
    header = ('you have', 'method', 'tokens', 'you get: speed-up', 'it costs: score in points')
    return markdown(header, rows)


def speedups(glob: str) -> str:
    """Of all machines: the median over our runs, or the range of that and what others measured."""
    ours = median(run['speedup'] for run in read(BENCHMARKS, glob).values())
    network = glob.removesuffix('_run*')
    others = [
        speedup
        for found in other_machines().values()
        for (of, _), speedup in found.items()
        if of == network
    ]
    return '–'.join(dict.fromkeys(f'{end([ours, *others]):.2f}' for end in (min, max)))


def other_machines() -> dict[str, dict[tuple[str, str], float]]:
    """Speed-ups by processor, then by network and data type; the last were measured by others."""
    measured: dict[str, dict[tuple[str, str], list[float]]] = {}
    for name, run in read(BENCHMARKS / 'machines', '*').items():
        found = measured.setdefault(run['environment']['device'], {})
        network = re.sub(r'_[a-z0-9]+_run\d+$', '', name)
        found.setdefault((network, run['dtype']), []).append(run['speedup'])
    medians = {
        cpu: {key: median(values) for key, values in found.items()}
        for cpu, found in measured.items()
    }
    reported = json.loads((BENCHMARKS / 'reported' / 'xeon_amx.json').read_text())
    theirs = {(run['network'], run['dtype']): run['speedup'] for run in reported['runs']}
    return {**medians, reported['cpu']: theirs}


def machines() -> str:
    """Speed-ups on all machines."""
    others, rows, ours = other_machines(), [], set()
    for network, dtype in dict.fromkeys(key for found in others.values() for key in found):
        runs = read(BENCHMARKS, f'{network}_run*').values()
        ours |= {run['environment']['device'] for run in runs}
        here = [run['speedup'] for run in runs if run['dtype'] == dtype]
        there = [found.get((network, dtype)) for found in others.values()]
        cells = ['–' if value is None else f'{value:.2f}'
                 for value in (median(here) if here else None, *there)]  # fmt: skip
        executed = median(run['executed_ratio'] for run in runs)
        name = network.replace('_forward_', ', ').replace('_train_', ', training, ')
        rows.append((name, dtype, f'{executed:.2f}', *cells))
    (cpu,) = ours
    return markdown(('backbone, image', 'precision', 'executed MAC ratio', cpu, *others), rows)


def differences(results: dict) -> list[str]:
    """How far networks are from their dense twins, in points."""
    found = [
        f'{METRICS[metric].label} {signed(spreads["difference"]["mean"], 1)}'
        for pair in results['pairs']
        if '-dense_' in pair['twin']
        for metric, spreads in pair['metrics'].items()
    ]
    return [', '.join(found) + ' (one seed)' * (len(results['seeds']) == 1)]


def speed(glob: str = '*') -> str:
    """Medians over runs of benchmark.py."""
    files = sorted(BENCHMARKS.glob(f'{glob}.json'))
    command = [sys.executable, ROOT / 'tools' / 'analysis' / 'summary.py', '--markdown', *files]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def profiles() -> str:
    """Milliseconds by kind of work, of networks and of their dense twins."""
    kinds, rows = [], []
    for name, run in read(BENCHMARKS / 'profiles', '*').items():
        sparse, dense = (run['profile_ms'][network] for network in ('sparse', 'dense'))
        kinds = list(sparse)
        pairs = [(sparse[kind], dense[kind]) for kind in kinds]
        pairs.append((sum(sparse.values()), sum(dense.values())))
        rows.append((name.replace('_', ', '), *(f'{a:.0f} / {b:.0f}' for a, b in pairs)))
    return markdown(('backbone, image, precision', *kinds, 'sum'), rows)


def compiled() -> str:
    """Milliseconds with and without torch.compile, of networks and of their dense twins."""
    rows = []
    for name, eager in read(BENCHMARKS / 'compiled', '*_eager').items():
        name = name.removesuffix('_eager')
        (run,) = read(BENCHMARKS / 'compiled', f'{name}_compiled').values()
        cells = (
            cell
            for r in (eager, run)
            for cell in (f'{r["sparse_ms"]:.0f} / {r["dense_ms"]:.0f}', f'{r["speedup"]:.2f}×')
        )
        rows.append((name.replace('_', ', '), *cells))
    header = ('eager, ms', 'speed-up', 'compiled, ms', 'speed-up')
    return markdown(('backbone, image', *header), rows)


def macs(glob: str = '*') -> str:
    """What flops.py counted at 800 x 1280."""
    rows = []
    for name, run in read(BENCHMARKS / 'macs', glob).items():
        assert run['shape'] == [800, 1280], name
        name += ratio_of(run)
        sparse, dense = run['sparse'], run['dense']
        rows.append(
            (name, f'{sparse["macs"] / 1e9:.1f}', f'{dense["macs"] / 1e9:.1f}',
             f'{run["mac_ratio"]:.2f}', f'{sparse["parameters"] / 1e6:.2f}')
        )  # fmt: skip
    return markdown(('backbone', 'G MACs', 'dense twin', 'ratio', 'M parameters'), rows)


def ratio_of(run: dict) -> str:
    """``', query ratio 0.436'`` of what flops.py counted at that ratio; empty without one."""
    for ratio in ('query_ratio', 'coarse_ratio'):
        if run.get(ratio) is not None:
            (value,) = run[ratio] if isinstance(run[ratio], list) else [run[ratio]]
            return f', {ratio.replace("_", " ")} {value}'
    return ''


def memory(glob: str = '*') -> str:
    """Multiply-accumulates and peak memory of backbones on large images, in brackets the twins'."""
    rows = []
    for name, run in read(BENCHMARKS / 'high_resolution', glob).items():
        sparse, dense = run['sparse'], run['dense']
        peaks = (
            f'{run["peak_mb"]["sparse"][step]:.0f} ({run["peak_mb"]["dense"][step]:.0f})'
            for step in ('forward pass', 'training step')
        )
        rows.append(
            (name.replace('_', ', ') + ratio_of(run),
             f'{sparse["macs"] / 1e9:.0f} ({dense["macs"] / 1e9:.0f})', f'{run["mac_ratio"]:.2f}',
             *peaks)
        )  # fmt: skip
    header = ('backbone, image', 'G MACs', 'ratio', 'MiB, forward pass', 'MiB, training step')
    return markdown(header, rows)


def scores(glob: str = '*') -> str:
    """Comparisons of compare.py."""
    rows = []
    for results in read(BENCHMARKS / 'shapes', glob).values():
        for pair in results['pairs']:
            for metric, spreads in pair['metrics'].items():
                sparse, dense, difference = (spreads[k] for k in ('sparse', 'dense', 'difference'))
                rows.append(
                    (f'`{Path(pair["config"]).stem}`', METRICS[metric].label, plus_minus(sparse),
                     plus_minus(dense), plus_minus(difference, signed), str(len(pair['seeds'])))
                )  # fmt: skip
    header = ('config', 'metric', 'score', 'of the other', 'difference', 'seeds')
    return markdown(header, rows)


def plus_minus(values: dict, form=lambda value: f'{value:.2f}') -> str:
    """A mean, and its standard deviation if there is one."""
    deviation = '' if values['std'] is None else f' ± {values["std"]:.2f}'
    return form(values['mean']) + deviation


def signed(value: float, decimals: int = 2) -> str:
    """A difference, with a minus sign proper."""
    return f'{value:+.{decimals}f}'.replace('-', '−')


def models() -> str:
    """Backbones by name, with the maps that they return if nothing else is asked for."""
    rows = []
    for name in list_models():
        cls, arch = find_model(name)
        with torch.device('meta'):
            backbone = cls(arch=arch)
        info, parameters = backbone.feature_info, sum(p.numel() for p in backbone.parameters())
        rows.append(
            (f'`{name}`', f'`{cls.__name__}`', ', '.join(map(str, info.reduction())),
             ', '.join(map(str, info.channels())), str(backbone.num_stages),
             f'{parameters / 1e6:.2f}')
        )  # fmt: skip
    return markdown(('name', 'type', 'strides', 'channels', 'stages', 'M parameters'), rows)


def networks(folder: str) -> str:
    """Parameters and MACs in a metafile, a row for each network, in brackets its dense twin's.

    Where configs of one network differ (another neck, another image size) all figures are given.
    """
    figures: dict[str, dict[tuple[str, bool], set[str]]] = {}
    for model in metafile(folder)['Models']:
        metadata = model['Metadata']
        if 'FLOPs' not in metadata:
            continue
        name, twin = network_name(model['Name'])
        row = figures.setdefault(name, {})
        row.setdefault(('M parameters', twin), set()).add(f'{metadata["Parameters"] / 1e6:.2f}')
        data = f'{metadata["Training Data"]}, G MACs'
        row.setdefault((data, twin), set()).add(f'{metadata["FLOPs"] / 1e9:.2f}')
    known = {column for row in figures.values() for column, _ in row}
    columns = ['M parameters', *(c for c in (f'{d}, G MACs' for d in DATA) if c in known)]

    def cell(row: dict, column: str) -> str:
        own, twin = (
            ' / '.join(sorted(row.get((column, side), ()), key=float)) for side in (False, True)
        )
        return f'{own} ({twin})' if twin else own

    body = [
        (f'`{name}`', *(cell(figures[name], column) for column in columns))
        for name in sorted(figures, key=size_key)
    ]
    return markdown(('backbone', *columns), body)


def network_name(config: str) -> tuple[str, bool]:
    """``('dge-pvt-s', True)`` of ``mask-rcnn_dge-pvt-s-dense_fpn_...``: network, whether a twin."""
    head, *others = config.split('_')
    name = head if re.match(r'\d+xb', others[0]) else others[0]  # classifiers begin with it
    words = [SHORT.get(word, word) for word in name.split('-') if word != 'dense']
    return '-'.join(words), '-dense' in name


def published() -> str:
    """Results in metafiles, which are those of the methods' authors."""
    rows = []
    for folder in sorted(path.parent.name for path in ROOT.glob('configs/*/metafile.yml')):
        for model in metafile(folder)['Models']:
            if 'Results' not in model:
                continue
            metrics = {k: v for result in model['Results'] for k, v in result['Metrics'].items()}
            source = model['Converted From']
            rows.append(
                (f'[`{model["Name"]}`](../{model["Config"]})', model['Results'][0]['Dataset'],
                 ', '.join(f'{name} {value}' for name, value in metrics.items()),
                 ', '.join(f'[{kind.lower()}]({url})' for kind, url in source.items()))
            )  # fmt: skip
    return markdown(('config', 'data', 'published by the authors', 'source'), rows)


def study(task: str) -> str:
    """Accuracy and cost of the rows of a task, beside the dense network at lower resolutions."""
    module = study_module('summaries')
    summaries = module.with_shared_seeds(module.summarize(task))
    names, rows = list(summaries[0].scores), []
    for summary in summaries:
        above = (module.above_line(summary, summaries, name) for name in names)
        ratio = summary.query_ratio
        rows.append(
            (f'`{summary.name}`', *(plus_minus(spread(v)) for v in summary.scores.values()),
             ' / '.join('–' if points is None else signed(points, 1) for points in above),
             *costs(summary.cost),
             '–' if ratio is None else f'{ratio[0]:.2f} ± {ratio[1]:.2f}')
        )  # fmt: skip
    header = ('row', *names, 'above the line', 'ms', 'G MACs', 'MiB', 'tokens')
    return markdown(header, rows)


def seeds(task: str) -> str:
    """Scores of the rows that were trained with several seeds, seed by seed."""
    several = [s for s in study_module('summaries').summarize(task) if len(s.seeds) > 1]
    columns = sorted({seed for summary in several for seed in summary.seeds})
    rows = []
    for summary in several:
        by_seed = dict(zip(summary.seeds, zip(*summary.scores.values(), strict=True), strict=True))
        cells = (' / '.join(f'{v:.2f}' for v in by_seed.get(seed, ())) for seed in columns)
        rows.append((f'`{summary.name}`', *(cell or '–' for cell in cells)))
    return markdown(('row', *(f'seed {seed}' for seed in columns)), rows)


def costs(cost: dict | None) -> tuple[str, str, str]:
    """Milliseconds, billions of multiply-accumulates and MiB of a row of the study."""
    if cost is None:
        return '–', '–', '–'
    gmacs = cost['gmacs']['mean']
    return (
        f'{cost["ms"]["median"]:.0f}', f'{gmacs:.{1 if gmacs >= 10 else 2}f}',
        f'{cost["peak_mb"]:.0f}',
    )  # fmt: skip


def batches(task: str) -> str:
    """Speed-up over the dense network and spread over photographs, by the size of a batch."""
    files = (BENCHMARKS / 'study' / 'results' / task).glob('cost*.json')
    sizes = sorted((json.loads(file.read_text()) for file in files), key=lambda c: c['batch_size'])
    rows = []
    for name in sizes[-1]['rows']:  # not all rows are measured in batches
        cells = []
        for found in sizes:
            row, dense = (found['rows'][key]['ms']['median'] for key in (name, 'dense'))
            deviation = found['rows'][name]['ms_by_batch']['std']
            over = '' if deviation is None else f' ± {deviation / row:.1%}'
            cells.append(f'{dense / row:.2f}×{over}')
        rows.append((f'`{name}`', *cells))
    return markdown(('row', *(f'batch of {found["batch_size"]}' for found in sizes)), rows)


def gates(task: str) -> str:
    """How well gates find the regions whose labels change."""
    results = json.loads((BENCHMARKS / 'study' / 'results' / task / 'gates.json').read_text())
    rows = [
        (setting['name'], f'{setting["coverage"]:.3f}', f'{setting["coverage_of_all"]:.3f}')
        for setting in results['settings']
    ]
    return markdown(('gate', 'of each photograph', 'of all photographs'), rows)


def budgets(task_and_row: str) -> str:
    """Scores and times of one checkpoint at several budgets."""
    task, row = task_and_row.split('/')
    file = BENCHMARKS / 'study' / 'results' / task / f'budgets_{row}.json'
    module, found = study_module('summaries'), json.loads(file.read_text())['budgets']
    labels = {k: v for k, v in module.SCORES.items() if k in next(iter(found.values()))['scores']}
    rows = [
        (f'{float(tokens):.2f}', *(f'{module.points(k, b["scores"][k]):.2f}' for k in labels),
         f'{b["ms"]["median"]:.0f}', f'{b["gmacs"]:.1f}')
        for tokens, b in found.items()
    ]  # fmt: skip
    return markdown(('tokens', *labels.values(), 'ms', 'G MACs'), rows)


def zoo() -> str:
    """Trained configs: those that are rows of the study without changes."""
    study_rows, module, rows = study_module('rows'), study_module('summaries'), []
    for task in study_rows.tasks():
        known = study_rows.read_rows(task)
        for summary in module.with_shared_seeds(module.summarize(task)):
            row = known[summary.name]
            if row.options or row.size or row.override:
                continue
            scores = (f'{k} {plus_minus(spread(v))}' for k, v in summary.scores.items())
            rows.append(
                (f'[`{Path(row.config).stem}`](../{row.config})', summary.weights or 'none',
                 ', '.join(scores), ' '.join(map(str, summary.seeds)), *costs(summary.cost),
                 f'`python benchmarks/study/run.py {task} {summary.name} --seed N`')
            )  # fmt: skip
    header = ('config', 'weights', 'scores', 'seeds', 'ms', 'G MACs', 'MiB', 'command')
    return markdown(header, rows)


def study_module(name: str) -> ModuleType:
    """A module of ``benchmarks/study``, which is no package."""
    folder = str(BENCHMARKS / 'study')
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


def metafile(folder: str) -> dict:
    """What a folder of configs lists."""
    return yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())


TABLES = dict(
    choice=choice, machines=machines, speed=speed, profiles=profiles, compiled=compiled,
    macs=macs, memory=memory, scores=scores, models=models, networks=networks,
    published=published, study=study, seeds=seeds, batches=batches, gates=gates,
    budgets=budgets, zoo=zoo,
)  # fmt: skip

if __name__ == '__main__':
    sys.exit(main())
