"""Scores and times of one trained network at several budgets of tokens."""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from measure import TimedModel, Trained, trainings
from mmengine.config import DictAction
from mmengine.runner import Runner
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import RESULTS, Row, read_rows, tasks
from summaries import SCORES, points

from mmtoken import set_budget
from mmtoken.analysis.environment import describe_environment
from mmtoken.analysis.spread import spread
from mmtoken.files import replacing

DESCRIPTION = """\
Test the checkpoint of one row of the study with several budgets (mmtoken.set_budget) and time it on
a few photographs. Printed and written to benchmarks/study/results/TASK/budgets_ROW.json; budgets
whose scores are there are not tested again, while times are always taken anew, all in one process.
"""


def main() -> int:
    """Test, time and print; return 0."""
    args = parse_args()
    torch.set_num_threads(1)
    row = read_rows(args.task)[args.row]
    trained = trainings(row, args.seed)
    if not trained:
        raise SystemExit(f'{args.row} has no checkpoint: benchmarks/study/run.py {args.task} ...')
    file = RESULTS / args.task / f'budgets_{args.row}.json'
    known = json.loads(file.read_text())['budgets'] if file.exists() else {}
    scores = {float(tokens): found['scores'] for tokens, found in known.items()}
    budgets = sorted({*scores, *args.tokens})
    for tokens in budgets:
        if tokens not in scores:
            scores[tokens] = test(row, args.seed, tokens, args.cfg_options or {})
            write(file, args, {t: dict(scores=s) for t, s in scores.items()})
    costs = measure(trained[0], budgets, args)
    write(file, args, {t: dict(scores=scores[t], **costs[t]) for t in budgets})
    report(json.loads(file.read_text())['budgets'])
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=tasks())
    parser.add_argument('row', help='a row that has been trained')
    parser.add_argument(
        '--tokens', nargs='+', type=float, default=[0.3, 0.4375, 0.6, 0.8, 1.0], metavar='T',
        help='budgets (default: 0.3 0.4375 0.6 0.8 1)',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='of the training (default: 0)')
    parser.add_argument('--photos', type=int, default=4, help='that are timed (default: 4)')
    parser.add_argument('--rounds', type=int, default=3, help='of timing (default: 3)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='K=V',
        help='how many workers load data, for example',
    )  # fmt: skip
    return parser.parse_args()


def test(row: Row, seed: int, tokens: float, options: dict) -> dict[str, float]:
    """Scores on the test set."""
    cfg = row.load(seed)
    cfg.merge_from_dict(options)
    cfg.model.backbone.pop('init_cfg', None)  # the checkpoint has all
    cfg.resume = False
    runner = Runner.from_cfg(cfg)
    set_budget(runner.model, tokens)
    return {name: round(float(value), 3) for name, value in runner.test().items()}


def measure(trained: Trained, budgets: list[float], args: argparse.Namespace) -> dict[float, dict]:
    """Milliseconds and multiply-accumulates by budget."""
    model = TimedModel(trained, args.photos, 1)
    batches = range(len(model.batches))
    times = {tokens: [] for tokens in budgets}
    model.run(0)
    for turn in track(range(args.rounds), 'Timing'):
        for tokens in budgets[:: -1 if turn % 2 else 1]:
            set_budget(model.model, tokens)
            times[tokens].append(mean(model.run(i)[0] for i in batches))
    costs = {}
    for tokens in budgets:
        set_budget(model.model, tokens)
        costs[tokens] = dict(ms=spread(times[tokens]), gmacs=mean(map(model.macs, batches)))
    return costs


def write(file: Path, args: argparse.Namespace, budgets: dict[float, dict]) -> None:
    """Write the JSON, as far as it is known."""
    content = dict(
        row=args.row,
        seed=args.seed,
        photos=args.photos,
        environment=describe_environment(torch.device('cpu')),
        budgets={str(tokens): budgets[tokens] for tokens in sorted(budgets)},
    )
    with replacing(file) as new:
        new.write_text(json.dumps(content, indent=2) + '\n')


def report(budgets: dict[str, dict]) -> None:
    """Print a table."""
    table = Table('tokens', box=SIMPLE_HEAD)
    found = [key for key in SCORES if all(key in b['scores'] for b in budgets.values())]
    for column in (*(SCORES[key] for key in found), 'ms', 'G MACs'):
        table.add_column(column, justify='right')
    for tokens, budget in budgets.items():
        scores = (f'{points(key, budget["scores"][key]):.2f}' for key in found)
        table.add_row(tokens, *scores, f'{budget["ms"]["median"]:.0f}', f'{budget["gmacs"]:.1f}')
    Console().print(table)


if __name__ == '__main__':
    raise SystemExit(main())
