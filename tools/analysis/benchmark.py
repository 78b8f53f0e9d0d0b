"""Time and memory of a config's network, its dense twin and the library's own backbone."""

import sys
from functools import partial
from pathlib import Path

from cli import (
    fail,
    figure,
    make_parser,
    num_ratios,
    positive,
    progress_bar,
    quieten,
    routing_line,
    routing_words,
    write_json,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Time a sparse network, its dense twin and the library's own backbone of the same widths.

All run in turn in one process, in each round in the opposite order of the round before. A speed-up
is the median of the ratios within rounds, and `realised` = speed-up / MAC ratio. MACs are those of
a forward pass per image (the mean over the batch) on the reference path; the ratio of the MACs that
the fast paths execute is printed as well. Weights are random and images are noise, so the cost of a
network with routers depends on --ratio, which applies to the sparse network alone.

A step is a forward pass. With --train it is a forward pass, backward from the mean squares of the
outputs, and the release of gradients, without an optimizer. Peak memory is that of one step above
the weights: on CUDA as torch allocates it, on a CPU as the resident memory of a separate process,
not compiled.

With --profile the time of torch's operators is printed by kind of work, without that of Python. The
profiler itself takes some time, so that only shares can be compared. For forward passes of a model
the time in backbone, neck and heads is printed as well, that of Python included.

In half precision, forward passes run on cast weights; the libraries' own modules, which do not
support that alone, also run under autocast. Training runs under autocast with weights in float32,
as with the libraries' --amp.
"""
EXAMPLES = """\
examples:
  mmtoken benchmark configs/stvit_r/mask-rcnn_stvit-r-swin-s_fpn_8xb2-1x_coco.py
  mmtoken benchmark CFG --shape 512 512 --threads 2 --rounds 20 --json out.json
  mmtoken benchmark CFG --device cuda --dtype float16 --batch-size 8 --train
  mmtoken benchmark CFG --part model --against OTHER_CFG.py
  mmtoken benchmark CFG --part model --profile
  mmtoken benchmark DGE_CFG --ratio 0.43
  mmtoken benchmark MSVIT_CFG --batch-size 4 --ratio 0.2 0.4 0.6 0.8
"""


def main() -> int:
    """Measure, print a table; return 0, or 1 if nothing could be measured."""
    args = parse_args()
    images = num_ratios(args.ratio)
    if args.batch_size % images:
        return fail(
            f'{images} ratios go to {images} images: --batch-size must be a multiple of {images}, '
            f'got {args.batch_size}'
        )
    quieten()
    import torch  # after the arguments are known to be good
    from benchmarking.measure import count_progress, measure
    from benchmarking.step import Setting

    from mmtoken.analysis.configs import default_shape, load_config

    if args.device == 'cuda' and not torch.cuda.is_available():
        return fail('--device cuda: torch sees no CUDA device here; use --device cpu')
    try:
        cfg = load_config(args.config)
        targets = choose_targets(cfg, args)
        setting = Setting(
            shape=tuple(args.shape or default_shape(cfg)),
            batch_size=args.batch_size,
            device=torch.device(args.device),
            dtype=getattr(torch, args.dtype),
            train=args.train,
            compiled=args.compile,
            threads=args.threads,
        )
        with progress_bar() as progress:
            task = progress.add_task('measuring', total=count_progress(len(targets), args.rounds))
            advance = partial(progress.advance, task)
            measured = measure(targets, setting, args.rounds, args.profile, advance)
    except (OSError, ValueError) as error:
        return fail(error)
    results = summarize(measured, targets) | describe(args, setting, targets['sparse'])
    report(results, measured, targets)
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
    parser.add_argument(
        '--compile',
        action='store_true',
        help="all through torch.compile, without the library's own backbone",
    )
    parser.add_argument(
        '--profile',
        action='store_true',
        help='also where the time goes, by kind of work and by part of the model',
    )
    parser.add_argument(
        '--against', nargs='+', default=[], metavar='CFG', help='further configs to compare with'
    )
    return parser.parse_args()


def choose_targets(cfg, args) -> dict:
    """The sparse network, its twin, the library's own and others, by their names in the results.

    Raises:
        OSError, ValueError: A config that cannot be compared.
    """
    from benchmarking.targets import build_other_target, build_target, dense_target, library_target

    from mmtoken.analysis.configs import load_config

    sparse = build_target(cfg, args.part, args.ratio, args.ratio_name)
    targets = dict(sparse=sparse, dense=dense_target(sparse))
    if not args.compile:  # torch 2.11 fails on mmdet's Swin, in C++ that it writes
        targets['peer'] = library_target(sparse)
    for path in args.against:
        name = Path(path).stem
        targets[name] = build_other_target(load_config(path), args.part, name)
    return {name: target for name, target in targets.items() if target is not None}


def summarize(measured: dict, targets: dict) -> dict:
    """The figures that are quoted, and the raw ones behind them."""
    from mmtoken.analysis.spread import spread
    from mmtoken.analysis.timing import ratios

    sparse, dense, peer = measured['sparse'], measured['dense'], measured.get('peer')
    medians = {name: spread(m.times)['median'] for name, m in measured.items()}
    spreads = {
        name: spread(ratios(m.times, sparse.times))
        for name, m in measured.items()
        if name != 'sparse'
    }
    speedup = spreads['dense']['median']
    mac_ratio = dense.cost.macs / sparse.cost.macs
    return dict(
        sparse_ms=medians['sparse'],
        dense_ms=medians['dense'],
        speedup=speedup,
        **{f'{name}_measured': ratio for name, ratio in sparse.cost.ratios.items()},
        macs_sparse=sparse.cost.macs,
        macs_dense=dense.cost.macs,
        mac_ratio=mac_ratio,
        realised=speedup / mac_ratio,
        executed_ratio=dense.cost.executed / sparse.cost.executed,
        peak_mb_sparse=sparse.peak_mb,
        peak_mb_dense=dense.peak_mb,
        peer=targets['peer'].name if peer else None,
        peer_ms=medians.get('peer'),
        speedup_vs_peer=spreads['peer']['median'] if peer else None,
        macs_peer=peer.cost.macs if peer else None,
        peak_mb_peer=peer.peak_mb if peer else None,
        against={
            name: dict(
                ms=medians[name], speedup=spreads[name]['median'], macs=m.cost.macs,
                peak_mb=m.peak_mb,
            )
            for name, m in measured.items()
            if name not in ('sparse', 'dense', 'peer')
        },
        executed={name: m.cost.executed for name, m in measured.items()},
        parameters={name: m.cost.parameters for name, m in measured.items()},
        speedup_spreads=spreads,
        round_ms={name: m.times for name, m in measured.items()},
        **(
            dict(profile_ms={name: m.profile for name, m in measured.items()})
            if sparse.profile
            else {}
        ),
        **(dict(parts_ms={name: m.parts for name, m in measured.items()}) if sparse.parts else {}),
    )  # fmt: skip


def describe(args, setting, sparse) -> dict:
    """What was measured, and on what."""
    from mmtoken.analysis.environment import describe_environment

    return dict(
        config=Path(args.config).name,
        part=args.part,
        **sparse.routing,
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


def report(results: dict, measured: dict, targets: dict) -> None:
    """Print the table."""
    from mmtoken.analysis.spread import spread

    console = Console()
    height, width = results['shape']
    sparse = targets['sparse']
    step = 'training step' if results['train'] else 'forward pass'
    title = [
        results['part'].capitalize(),
        f'{step} of {results["batch_size"]} x {sparse.in_channels} x {height} x {width}',
        results['dtype'],
        *['compiled'] * results['compile'],
        *routing_words(sparse.routing),
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
        ms, ratio = spread(m.times), results['speedup_spreads'].get(name)
        table.add_row(
            targets[name].name.rpartition('.')[2],
            f'{figure(m.cost.macs / 1e9)} G',
            f'{figure(ms["median"])} ({figure(ms["q1"])}–{figure(ms["q3"])})',
            '' if m.peak_mb is None else f'{m.peak_mb:.0f}',
            f'{ratio["median"]:.2f} ({ratio["min"]:.2f}–{ratio["max"]:.2f})' if ratio else '',
        )
    console.print(table)
    labels = [targets[name].name.rpartition('.')[2] for name in measured]
    for title, group in (('kind of work', 'profile'), ('part of the model', 'parts')):
        times = [getattr(m, group) for m in measured.values()]
        if all(times):
            console.print(time_table(title, labels, times))
    console.print(
        f'MAC ratio {results["mac_ratio"]:.2f} (executed {results["executed_ratio"]:.2f}), '
        f'speed-up over the twin {results["speedup"]:.2f}, realised {results["realised"]:.2f}.'
    )
    line = routing_line(sparse.routing, measured['sparse'].cost.ratios)
    if line:
        console.print(line)
    if results['peer']:
        library, _, name = results['peer'].rpartition('.')
        console.print(f'{name} is the backbone of {library} with the same widths and depths.')
    environment = results['environment']
    threads = f', threads: {results["threads"]}' if results['device'] == 'cpu' else ''
    machine = f'{environment["device"]}, torch {environment["torch"]}{threads}'
    console.print(f'{machine}, rounds: {results["rounds"]}.')


def time_table(title: str, labels: list[str], times: list[dict[str, float]]) -> Table:
    """Where the time goes: milliseconds and shares, a column for each network."""
    table = Table(title='Where the time goes, in ms', box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for label in labels:
        table.add_column(label, justify='right')
    for row in dict.fromkeys(row for column in times for row in column):
        shares = ((t.get(row, 0), t.get(row, 0) / sum(t.values())) for t in times)
        table.add_row(row, *(f'{figure(ms)} ({share:.0%})' for ms, share in shares))
    return table


if __name__ == '__main__':
    sys.exit(main())
