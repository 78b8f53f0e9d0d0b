"""Time, memory, waits and parity of all backbones on one GPU, in about ten minutes."""

import argparse
import sys
from pathlib import Path

from cli import HelpFormatter, fail, positive, progress_bar, quieten
from rich.console import Console

DESCRIPTION = """\
Measure all backbones on one GPU, the most important figures first, for as long as --minutes says.

Each backbone is timed in turn with its dense twin (the same network without token reduction) and
with the twin on smaller images ("lower"), on which it costs as many multiply-accumulates as the
sparse network on large ones: the plain alternative to sparse tokens. Weights are random, images are
noise, and DGE and MSViT take random layouts (query ratio 0.436, coarse ratio 0.5). It needs torch,
timm, mmengine and rich, but no other library of OpenMMLab, no data and no weights.

kinds of cases:
  forward     a forward pass: milliseconds, memory above the weights, and how often the host waits
              for the GPU (on a CPU: calls that would wait on a GPU)
  parity      relative difference of the maps to those of the same network on the CPU in float32,
              which fails above 0.1 in bfloat16 and 0.001 in float32; only MergeViT may differ more,
              since it pairs other tokens where two are equally similar
  training    forward and backward, without an optimizer; bfloat16 is autocast
  captured    a forward pass as a CUDA graph, for networks that do not choose by the image
  compiled    a forward pass through torch.compile
  packed, neighborhood
              attention of packed images of unequal lengths, and STViT-R's to the patch around a
              window, in several forms; the error is that to the first form

TF32 is off in float32.

columns: speed-up = twin / network; MAC ratio = multiply-accumulates of the twin / network;
realised = speed-up / MAC ratio; waits = synchronizations of a forward pass.

Results are written after every case. A case that fails is recorded with its error, and the exit
status is 1. Cases for which time was too short are listed. --resume measures both.
"""
EXAMPLES = """\
examples:
  mmtoken gpu-report gpu.json
  mmtoken gpu-report gpu.json --minutes 30 --resume
  mmtoken gpu-report gpu.json --networks STViTRSwin MSViT
  mmtoken gpu-report --list
  mmtoken gpu-report try.json --device cpu --quick
"""
SHOWN = 12  # names of cases left out that are printed


def main() -> int:
    """Measure, print a table; return 0, or 1 if nothing could be measured or a case failed."""
    args = parse_args()
    quieten()
    import torch  # after the arguments are known to be good
    from gpu_reporting.cases import list_cases
    from gpu_reporting.machine import describe_setup
    from gpu_reporting.networks import NETWORKS
    from gpu_reporting.record import Record

    cases = list_cases(args.device, args.quick)
    if unknown := set(args.networks) - set(NETWORKS):
        return fail(f'no network {", ".join(sorted(unknown))}; known are {", ".join(NETWORKS)}')
    if args.networks:
        cases = [case for case in cases if case.name in args.networks]
    if args.list:
        print(*cases, sep='\n')
        return 0
    if args.json is None:
        return fail('give a FILE to write the results to, or --list')
    if args.device == 'cuda' and not torch.cuda.is_available():
        return fail('--device cuda: torch sees no CUDA device here; try --device cpu --quick')
    device = torch.device(args.device)
    try:
        record = Record(args.json, describe_setup(device, args.quick), args.resume)
    except (OSError, ValueError) as error:
        return fail(error)
    left_out = measure(record, record.missing(cases), device, args)
    return report(record, cases, left_out)


def parse_args():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument(
        'json', type=Path, nargs='?', metavar='FILE', help='write the results here, after each case'
    )
    parser.add_argument(
        '--minutes', type=float, default=10, metavar='M', help='stop cleanly in time'
    )
    parser.add_argument(
        '--resume', action='store_true', help='measure the cases that failed or are missing in FILE'
    )
    parser.add_argument(
        '--networks', nargs='+', default=[], metavar='NAME', help='these alone, and no kernels'
    )
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='where to run')
    parser.add_argument(
        '--quick', action='store_true', help='tiny networks and images, to try the tool'
    )
    parser.add_argument(
        '--rounds', type=positive, default=5, metavar='N', help='how often each network is timed'
    )
    parser.add_argument('--list', action='store_true', help='print the cases in order, and stop')
    return parser.parse_args()


def measure(record, cases: list, device, args) -> list:
    """Measure cases into a record; return those for which time was too short."""
    import torch
    from gpu_reporting.measure import Bench
    from gpu_reporting.schedule import Schedule

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(device, args.quick, 1 if args.quick else args.rounds)
    with progress_bar() as progress:
        task = progress.add_task('measuring', total=len(cases))

        def keep(case, result: dict) -> None:
            record.add(case, result)
            progress.update(task, advance=1, description=str(case))

        schedule = Schedule(60 * args.minutes, bench.measure, keep)
        schedule.run(cases)
    return schedule.left_out


def report(record, cases: list, left_out: list) -> int:
    """Print the table and what is not in it; return the exit status."""
    from gpu_reporting.table import WIDTH, make_table

    console = Console()
    console.width = max(console.width, WIDTH)  # narrower terminals wrap lines, but show all
    console.print(make_table(cases, record.results))
    environment = record.setup['environment']
    console.print(f'{environment["device"]}, torch {environment["torch"]}. {record.path}')
    if left_out:
        names = '; '.join(map(str, left_out[:SHOWN]))
        more = f'; and {len(left_out) - SHOWN} more' if len(left_out) > SHOWN else ''
        console.print(f'Left out, {len(left_out)} cases (--resume measures them): {names}{more}')
    failed = [case for case in cases if 'failed' in record.results.get(str(case), {})]
    for case in failed:
        fail(f'{case}: {record.results[str(case)]["failed"]}')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
