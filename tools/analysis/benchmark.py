"""Time and memory of a config's network beside its dense twin and the library's own backbone."""

import sys
from pathlib import Path

from cli import (
    fail,
    figure,
    make_parser,
    positive,
    quieten,
    routing_line,
    routing_of,
    routing_words,
    write_json,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

DESCRIPTION = """\
Time a sparse network, its dense twin and the library's own backbone of the same widths.

All run in one process and in turn, in each round in the opposite order of the one before. A
speed-up is the median of the ratios within rounds, how much of the saved multiply-accumulates it
makes good is `realised` = speed-up / MAC ratio. MACs are of a forward pass, for one image (the
mean over the batch), on the reference path; the ratio of what the fast paths execute is given
beside. Weights are random and images are noise. What a network whose regions choose their
granularity then costs depends on --query-ratio or --coarse-ratio, which hold for the sparse network
alone.

A step is a forward pass; with --train, forward, backward from the mean squares of the outputs, and
release of the gradients, without an optimiser. Peak memory is that of one step above the weights:
on CUDA as torch allocates it, on a CPU as the resident memory of a process of its own, in eager
mode.

In half precision the weights of a forward pass are cast beforehand; the libraries' own modules,
which are not made for that, run in automatic mixed precision on top. With --train it is automatic
mixed precision with weights in float32, as under the libraries' --amp.
"""
EXAMPLES = """\
examples:
  python tools/analysis/benchmark.py configs/stvit_r/mask-rcnn_stvit-r-swin-s_fpn_8xb2-1x_coco.py
  python tools/analysis/benchmark.py CFG --shape 512 512 --threads 2 --rounds 20 --json out.json
  python tools/analysis/benchmark.py CFG --device cuda --dtype float16 --batch-size 8 --train
  python tools/analysis/benchmark.py CFG --part model --against OTHER_CFG.py
  python tools/analysis/benchmark.py configs/dge/mask-rcnn_dge-pvt-s_fpn_8xb2-1x_coco.py \\
      --query-ratio 0.43
  python tools/analysis/benchmark.py MSVIT_CFG --batch-size 4 --coarse-ratio 0.2 0.4 0.6 0.8
"""


def main() -> int:
    """Measure, print a table; return 0, or 1 if nothing could be measured."""
    args = parse_args()
    ratios = len(args.coarse_ratio or (None,))
    if args.batch_size % ratios:
        return fail(
            f'--coarse-ratio gives {ratios} images one each: --batch-size must be a multiple of '
            f'{ratios}, got {args.batch_size}'
        )
    quieten()
    import torch  # after the arguments are known to be good

    from mmtoken.analysis.compare import Setting, compare, count_advances
    from mmtoken.analysis.subject import default_shape, load_config

    if args.device == 'cuda' and not torch.cuda.is_available():
        return fail('--device cuda: torch sees no CUDA device here; use --device cpu')
    try:
        cfg = load_config(args.config)
        subjects = choose_subjects(cfg, args.part, args.against, routing_of(args))
        with subjects['sparse'].overriding():  # is the ratio in its range?
            pass
    except (OSError, ValueError) as error:
        return fail(error)
    setting = Setting(
        shape=tuple(args.shape or default_shape(cfg)),
        batch_size=args.batch_size,
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        train=args.train,
        compiled=args.compile,
        threads=args.threads,
        rounds=args.rounds,
    )
    columns = (
        TextColumn('{task.description}'), BarColumn(), TextColumn('{task.percentage:3.0f}%'),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task('measuring', total=count_advances(len(subjects), args.rounds))
            measured = compare(subjects, setting, lambda: progress.advance(task))
    except ValueError as error:  # a model that cannot be built, another kind of ratio
        return fail(error)
    results = summarise(measured, subjects) | describe(args, setting)
    report(results, measured, subjects)
    write_json(args.json, results)
    return 0


def parse_args():
    parser = make_parser(DESCRIPTION, EXAMPLES)
    parser.add_argument('--batch-size', type=positive, default=1, metavar='N', help='images')
    parser.add_argument('--threads', type=positive, default=1, metavar='N', help='on the CPU')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where to run')
    parser.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='precision'
    )
    parser.add_argument(
        '--rounds', type=positive, default=10, metavar='N', help='how often each is timed'
    )
    parser.add_argument('--train', action='store_true', help='training steps, not forward passes')
    parser.add_argument('--compile', action='store_true', help='all through torch.compile')
    parser.add_argument(
        '--against', nargs='+', default=[], metavar='CFG', help='further configs to compare with'
    )
    return parser.parse_args()


def choose_subjects(cfg, part: str, against: list[str], routing: dict) -> dict:
    """The sparse network, its twin, the library's own and others, by the names results have.

    Raises:
        OSError, ValueError: A config that cannot be compared.
    """
    from mmtoken.analysis.subject import any_subject, load_config, make_subject, peer_of, twin_of

    sparse = make_subject(cfg, part, routing)
    subjects = dict(sparse=sparse, dense=twin_of(sparse))
    peer = peer_of(sparse)
    if peer is not None:
        subjects['peer'] = peer
    for path in against:
        subjects[Path(path).stem] = any_subject(load_config(path), part, Path(path).stem)
    return subjects


def summarise(measured: dict, subjects: dict) -> dict:
    """The figures that are quoted, and the raw ones behind them."""
    from mmtoken.analysis.timing import Spread, ratios

    sparse, dense, peer = measured['sparse'], measured['dense'], measured.get('peer')
    medians = {name: Spread.of(m.times).median for name, m in measured.items()}
    spreads = {
        name: Spread.of(ratios(m.times, sparse.times))
        for name, m in measured.items()
        if name != 'sparse'
    }
    speedup = spreads['dense'].median
    mac_ratio = dense.cost.macs / sparse.cost.macs
    return dict(
        sparse_ms=medians['sparse'],
        dense_ms=medians['dense'],
        speedup=speedup,
        query_ratio_measured=sparse.cost.query_ratio,
        coarse_ratio_measured=sparse.cost.coarse_ratio,
        macs_sparse=sparse.cost.macs,
        macs_dense=dense.cost.macs,
        mac_ratio=mac_ratio,
        realised=speedup / mac_ratio,
        executed_ratio=dense.cost.executed / sparse.cost.executed,
        peak_mb_sparse=sparse.peak_mb,
        peak_mb_dense=dense.peak_mb,
        peer=subjects['peer'].name if peer else None,
        peer_ms=medians.get('peer'),
        speedup_vs_peer=spreads['peer'].median if peer else None,
        macs_peer=peer.cost.macs if peer else None,
        peak_mb_peer=peer.peak_mb if peer else None,
        against={
            name: dict(
                ms=medians[name], speedup=spreads[name].median, macs=m.cost.macs, peak_mb=m.peak_mb
            )
            for name, m in measured.items()
            if name not in ('sparse', 'dense', 'peer')
        },
        executed={name: m.cost.executed for name, m in measured.items()},
        parameters={name: m.cost.parameters for name, m in measured.items()},
        speedup_spreads={name: spread._asdict() for name, spread in spreads.items()},
        round_ms={name: m.times for name, m in measured.items()},
    )


def describe(args, setting) -> dict:
    """What was measured, and on what."""
    from mmtoken.analysis.environment import describe_environment

    return dict(
        config=Path(args.config).name,
        part=args.part,
        query_ratio=args.query_ratio,
        coarse_ratio=args.coarse_ratio,
        shape=list(setting.shape),
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        rounds=args.rounds,
        train=args.train,
        compile=args.compile,
        environment=describe_environment(setting.device),
    )


def report(results: dict, measured: dict, subjects: dict) -> None:
    """Print the table."""
    from mmtoken.analysis.timing import Spread

    console = Console()
    height, width = results['shape']
    channels = subjects['sparse'].in_channels
    step = 'training step' if results['train'] else 'forward pass'
    given = {name: results[name] for name in ('query_ratio', 'coarse_ratio')}
    routing = {name: ratio for name, ratio in given.items() if ratio is not None}
    title = [
        results['part'].capitalize(),
        f'{step} of {results["batch_size"]} x {channels} x {height} x {width}',
        results['dtype'],
        *['compiled'] * results['compile'],
        *routing_words(routing),
    ]
    table = Table(
        title=', '.join(title),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column('network', overflow='fold')
    for column in ('MACs', 'ms (quartiles)', 'peak MB', 'speed-up (range)'):
        table.add_column(column, justify='right', no_wrap=True)
    for name, m in measured.items():
        ms, ratio = Spread.of(m.times), results['speedup_spreads'].get(name)
        table.add_row(
            subjects[name].name.rpartition('.')[2],
            f'{figure(m.cost.macs / 1e9)} G',
            f'{figure(ms.median)} ({figure(ms.q1)}–{figure(ms.q3)})',
            '' if m.peak_mb is None else f'{m.peak_mb:.0f}',
            f'{ratio["median"]:.2f} ({ratio["low"]:.2f}–{ratio["high"]:.2f})' if ratio else '',
        )
    console.print(table)
    console.print(
        f'MAC ratio {results["mac_ratio"]:.2f} (executed {results["executed_ratio"]:.2f}), '
        f'speed-up over the twin {results["speedup"]:.2f}, realised {results["realised"]:.2f}.'
    )
    line = routing_line(routing, results['query_ratio_measured'], results['coarse_ratio_measured'])
    if line:
        console.print(line)
    if results['peer']:
        library, _, name = results['peer'].rpartition('.')
        console.print(f'{name} is the backbone of {library} with the same widths and depths.')
    environment = results['environment']
    threads = f', threads: {results["threads"]}' if results['device'] == 'cpu' else ''
    machine = f'{environment["device"]}, torch {environment["torch"]}{threads}'
    console.print(f'{machine}, rounds: {results["rounds"]}.')


if __name__ == '__main__':
    sys.exit(main())
