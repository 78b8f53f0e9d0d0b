"""Time of two ViT blocks that share an attention map, relative to two that do not."""

import argparse
import sys
from pathlib import Path

from cli import HelpFormatter, fail, figure, positive, progress_bar, quieten, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Time a pair of PSViT blocks, the second of which uses the attention map of the first, and a pair of
ordinary blocks with fused attention. MLPs are included. There is one image, with several numbers of
tokens.

Maps are shared in two ways. `map` stores the map: least arithmetic, but heads x N x N numbers for N
tokens. `query_key` stores queries and keys, and fused attention recomputes the map in each block.
`auto`, the default of mmtoken.PSViT, takes one of them by the number of tokens.

All run in turn in one process, in each round in the opposite order of the round before. A speed-up
is the median of the ratios within rounds. The MAC bound, the ratio of multiply-accumulates, is the
speed-up that arithmetic alone allows. Weights are random and tokens are noise, on which time does
not depend. It runs on the CPU, in float32.
"""
EXAMPLES = """\
examples:
  python tools/analysis/benchmark_sharing.py
  python tools/analysis/benchmark_sharing.py --tokens 196 4096 --rounds 20 --json sharing.json
  python tools/analysis/benchmark_sharing.py --channels 192 --threads 2
  python tools/analysis/benchmark_sharing.py --tokens 512 784 1024 --train
"""
TOKENS = [196, 400, 784, 1024, 1600, 4096]
HEAD_CHANNELS = 64
WAYS = ('map', 'query_key', 'auto')
WARM_UP_CALLS = 2


def main() -> int:
    """Measure, print a table; return 0, or 1 if the arguments do not fit each other."""
    args = parse_args()
    if args.channels % HEAD_CHANNELS:
        return fail(
            f'--channels must be a multiple of {HEAD_CHANNELS}, the channels of a head, '
            f'got {args.channels}'
        )
    quieten()
    import torch  # after the arguments are known to be good
    from benchmarking.environment import describe_environment

    torch.set_num_threads(args.threads)
    rows = []
    with progress_bar() as progress:
        total = len(args.tokens) * (len(WAYS) + 1) * (args.rounds + 1)
        task = progress.add_task('measuring', total=total)
        for tokens in args.tokens:
            progress.update(task, description=f'{tokens} tokens')
            rows.append(measure(args, tokens, lambda: progress.advance(task)))
    results = dict(
        channels=args.channels,
        heads=args.channels // HEAD_CHANNELS,
        threads=args.threads,
        rounds=args.rounds,
        train=args.train,
        pairs=rows,
        environment=describe_environment(torch.device('cpu')),
    )
    report(results)
    write_json(args.json, results)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument(
        '--tokens', type=positive, nargs='+', default=TOKENS, metavar='N', help='of an image'
    )
    parser.add_argument(
        '--channels', type=positive, default=384, metavar='C', help='of a token, 64 for each head'
    )
    parser.add_argument('--threads', type=positive, default=1, metavar='N', help='of torch')
    parser.add_argument(
        '--rounds', type=positive, default=10, metavar='N', help='how often each is timed'
    )
    parser.add_argument('--train', action='store_true', help='forward and backward, not inference')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here as well')
    return parser.parse_args()


def measure(args: argparse.Namespace, tokens: int, advance) -> dict:
    """Results for one number of tokens."""
    import torch
    from benchmarking.timing import ratios, time_in_turn

    from mmtoken.analysis.macs import count_macs
    from mmtoken.analysis.spread import spread
    from mmtoken.runtime.reference import reference_path

    torch.manual_seed(0)
    image = torch.randn(1, 1, tokens, args.channels)
    pairs = dict(dense=make_pair(args, (1, 1), 'auto'))
    pairs |= {way: make_pair(args, (2,), way) for way in WAYS}
    with reference_path():
        macs = {name: count_macs(pair, image) for name, pair in pairs.items()}
    steps = {name: make_step(pair, image, args.train) for name, pair in pairs.items()}
    for step in steps.values():
        for _ in range(WARM_UP_CALLS):
            step()
    times = time_in_turn(steps, args.rounds, image.device, advance)
    return dict(
        tokens=tokens,
        mac_bound=macs['dense'] / macs['map'],
        dense_ms=spread(times['dense'])['median'],
        speedup={way: spread(ratios(times['dense'], times[way])) for way in WAYS},
        map_mib=pairs['map'].map_bytes((1, tokens)) / 2**20,
        auto_keeps_map=pairs['auto'].map_bytes((1, tokens), training=args.train) > 0,
        round_ms=times,
    )


def make_pair(args: argparse.Namespace, groups: tuple[int, ...], sharing: str):
    """Two blocks in groups."""
    from mmtoken.layers.psvit.stage import SharingStage

    return SharingStage(
        args.channels,
        args.channels // HEAD_CHANNELS,
        groups,
        4 * args.channels,
        sharing=sharing,
        max_map_tokens=max(args.tokens),
    ).train(args.train)


def make_step(pair, image, train: bool):
    """The function that is timed."""
    import torch

    def infer() -> None:
        with torch.no_grad():
            pair(image)

    def learn() -> None:
        pair(image.detach().requires_grad_()).square().mean().backward()
        pair.zero_grad(set_to_none=True)

    return learn if train else infer


def report(results: dict) -> None:
    """Print the table."""
    console = Console()
    step = 'training step' if results['train'] else 'forward pass'
    title = f'Two blocks, {step} of 1 x N x {results["channels"]}, {results["heads"]} heads'
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    columns = ('tokens', 'dense ms', 'MAC bound', *WAYS, 'map MiB')
    for column in columns:
        table.add_column(column, justify='right', no_wrap=True)
    for row in results['pairs']:
        kept = 'map' if row['auto_keeps_map'] else 'query_key'
        speedups = [f'{row["speedup"][way]["median"]:.2f}' for way in WAYS]
        speedups[-1] += f' ({kept})'
        table.add_row(
            str(row['tokens']),
            figure(row['dense_ms']),
            f'{row["mac_bound"]:.3f}',
            *speedups,
            figure(row['map_mib']),
        )
    console.print(table)
    console.print('Speed-ups over two ordinary blocks; in brackets what auto stores.')
    environment = results['environment']
    console.print(
        f'{environment["device"]}, torch {environment["torch"]}, threads: {results["threads"]}, '
        f'rounds: {results["rounds"]}.'
    )


if __name__ == '__main__':
    sys.exit(main())
