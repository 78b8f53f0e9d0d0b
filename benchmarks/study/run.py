"""Train and test one row of the study."""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from rows import ROOT, Row, read_rows, tasks

from mmtoken.analysis.configs import load_config
from mmtoken.analysis.decisions import query_ratio
from mmtoken.analysis.environment import describe_environment
from mmtoken.analysis.spread import spread
from mmtoken.files import replacing
from mmtoken.runtime.decisions import record_routing

DESCRIPTION = """\
Train and test one row of benchmarks/study/TASK.yml with one seed, and write its scores to
benchmarks/study/results/TASK/ROW_seedN.json. A finished row is not repeated; an interrupted
training goes on from its last checkpoint. The data is expected under data/, as tools/datasets makes
it.
"""
EXAMPLES = """\
examples:
  python benchmarks/study/run.py ccp --list
  python benchmarks/study/run.py ccp dense --seed 0
  python benchmarks/study/run.py nuclei stvit-r
  python benchmarks/study/run.py ccp msvit --seed 1 --cfg-options \\
      model.backbone.init_cfg.checkpoint=dinov2_vits14.pth
"""


def main() -> int:
    """Run the row; return 0."""
    args = parse_args()
    rows = read_rows(args.task)
    if args.list or args.row is None:
        print('\n'.join(rows))
        return 0
    if args.row not in rows:
        raise SystemExit(f'{args.task}.yml has no row {args.row!r}; it has {", ".join(rows)}')
    row = rows[args.row]
    result = row.result(args.seed)
    if result.exists():
        print(f'{result} is there: delete it to repeat the row')
        return 0
    scores = run(row, args.seed, args.cfg_options or {})
    with replacing(result) as new:
        new.write_text(json.dumps(scores, indent=2) + '\n')
    print(f'{result}: {scores["scores"]}')
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('task', choices=tasks())
    parser.add_argument('row', nargs='?', help='a row of TASK.yml')
    parser.add_argument('--list', action='store_true', help='name the rows and stop')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='default: 0')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='K=V',
        help='where this machine keeps weights, or how many workers load data; what changes '
        'scores belongs into TASK.yml',
    )  # fmt: skip
    return parser.parse_args()


def run(row: Row, seed: int, options: dict) -> dict:
    """Train and test; return what the JSON holds."""
    cfg = row.load(seed)
    cfg.merge_from_dict(options)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None  # the test set, once, at the end
    cfg.test_dataloader.batch_size = 1  # decisions are counted by image
    runner = Runner.from_cfg(cfg)
    started = time.perf_counter()
    with row.choices():
        runner.train()
        trained = time.perf_counter() - started
        with record_routing() as decisions:
            scores = runner.test()
    images = len(runner.test_dataloader.dataset)
    each = len(decisions) // images
    ratios = [
        query_ratio(decisions[i * each : (i + 1) * each]) for i in range(images if each else 0)
    ]
    return dict(
        task=row.task,
        row=row.name,
        seed=seed,
        config=row.config,
        options=row.options,
        size=row.size,
        override=row.override,
        weights=weights_of(row, cfg),
        scores={name: round(float(value), 3) for name, value in scores.items()},
        train_seconds=round(trained, 1),
        train_peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        threads=torch.get_num_threads(),
        query_ratio=spread(ratios) if ratios else None,
        environment=describe_environment(torch.device('cpu')),
    )


def weights_of(row: Row, cfg: Config) -> str | None:
    """The file that training starts from; None from scratch."""
    of_backbone = (cfg.model.backbone.get('init_cfg') or {}).get('checkpoint')
    # Of the file, since a training that goes on has its own checkpoint there.
    given = of_backbone or load_config(ROOT / row.config).get('load_from')
    return None if given is None else Path(given).name


if __name__ == '__main__':
    raise SystemExit(main())
