"""Run a network for a long time, on images of changing sizes, and watch memory and time."""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmtoken import create_model, token_losses
from mmtoken.analysis.environment import describe_environment
from mmtoken.analysis.resident_memory import MEBIBYTE, resident_bytes
from mmtoken.files import replacing
from mmtoken.layers.common.cache import PLANS

DESCRIPTION = """\
Run the smallest network of each method, in a process of its own, for 2,000 requests or training
steps. Their images have random sizes, as in a server. Every 20 of them are recorded, in
benchmarks/soak/{requests,training}.json:

  resident_mb   memory of the process
  plans_mb      index tables that are kept, of at most 64 MiB
  probe_ms      time of one image of a fixed size

and the table says how far the last quarter is from the second, medians both. In the first, memory
grows with the sizes that are new.
"""
HERE = Path(__file__).resolve().parent
MODELS = (
    'stvit_r_swin_tiny', 'stvit_deit_tiny', 'dge_pvt_tiny', 'dge_dpvt_tiny', 'dge_deit_tiny',
    'msvit_tiny', 'merge_vit_tiny', 'psvit_tiny', 'swat_swin_tiny', 'swat_deit_tiny',
)  # fmt: skip
SIZES = dict(requests=(33, 224), training=(33, 96))  # smallest and largest side, in pixels
PROBE = (96, 128)
EVERY = 20


def main() -> int:
    """Run and write; return 0."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('kind', choices=SIZES)
    parser.add_argument(
        '--models', nargs='+', default=MODELS, metavar='NAME', help='these alone (default: all)'
    )
    parser.add_argument('--steps', type=int, default=2000, metavar='N', help='default: 2000')
    args = parser.parse_args()
    file = HERE / f'{args.kind}.json'
    measured = json.loads(file.read_text()) if file.exists() else dict(models={})
    for name in args.models:
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            measured['models'][name] = pool.submit(soak, name, args.kind, args.steps).result()
        measured |= dict(
            kind=args.kind, every=EVERY, environment=describe_environment(torch.device('cpu'))
        )
        with replacing(file) as new:
            new.write_text(json.dumps(measured) + '\n')
    report(measured['models'])
    return 0


def soak(name: str, kind: str, steps: int) -> dict[str, list[float]]:
    """What is recorded of one network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model(name, drop_path_rate=0.1)
    step = trainer(model) if kind == 'training' else server(model)
    records: dict[str, list[float]] = dict(resident_mb=[], plans_mb=[], probe_ms=[])
    sizes = random_sizes(*SIZES[kind])
    for index in track(range(steps), name):
        step(torch.rand(1, 3, *next(sizes)))
        if index % EVERY == EVERY - 1:
            started = time.perf_counter()
            step(torch.rand(1, 3, *PROBE))
            records['probe_ms'].append(1e3 * (time.perf_counter() - started))
            records['resident_mb'].append(resident_bytes() / MEBIBYTE)
            records['plans_mb'].append(sum(PLANS.nbytes().values()) / MEBIBYTE)
    return {key: [round(value, 2) for value in values] for key, values in records.items()}


def random_sizes(least: int, most: int) -> Iterator[tuple[int, int]]:
    """Heights and widths without end, the same ones in each run."""
    draw = random.Random(0)
    while True:
        yield draw.randint(least, most), draw.randint(least, most)


def server(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    """A forward pass."""
    model.eval()

    @torch.inference_mode()
    def step(images: torch.Tensor) -> None:
        model(images)

    return step


def trainer(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    """A step of training."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(images: torch.Tensor) -> None:
        optimizer.zero_grad()
        with token_losses() as published:
            loss = sum(feature.square().mean() for feature in model(images))
        (loss + published.total()).backward()
        optimizer.step()

    return step


def drift(values: list[float]) -> tuple[float, float]:
    """Medians of the second quarter and of the last."""
    quarter = len(values) // 4
    return median(values[quarter : 2 * quarter]), median(values[-quarter:])


def report(results: dict) -> None:
    """Print how far ends are from beginnings."""
    table = Table('network', box=SIMPLE_HEAD)
    for column in ('MiB', 'MiB at the end', 'plans MiB', 'ms', 'ms at the end'):
        table.add_column(column, justify='right')
    for name, records in results.items():
        memory, time_of_probe = (drift(records[key]) for key in ('resident_mb', 'probe_ms'))
        table.add_row(
            name,
            *(f'{value:.0f}' for value in memory),
            f'{max(records["plans_mb"]):.1f}',
            *(f'{value:.1f}' for value in time_of_probe),
        )
    Console().print(table)


if __name__ == '__main__':
    raise SystemExit(main())
