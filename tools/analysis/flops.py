"""Multiply-accumulates and parameters of a config's network beside its dense twin."""

import sys
from dataclasses import replace
from pathlib import Path

from cli import (
    fail,
    figure,
    make_parser,
    num_ratios,
    quieten,
    routing_line,
    routing_words,
    write_json,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Count the multiply-accumulates (MACs) of a sparse network and of its dense twin, by part of the
model and kind of work: linear layers, convolutions, and attention (scores and weighted sums). A
MAC is two of the operations that torch's flop counter counts.

Counted is the reference path, which computes exactly what the method defines. `executed` is the
count of the fast path: higher where it computes pairs of tokens that a mask hides, lower where it
skips padding.

Counts are per image. With several ratios there is one image for each, and counts are the mean.
Images are noise, which matters to networks that choose their tokens by the image.

With --memory, peaks of a forward pass and of a training step above the weights are measured as by
benchmark.py: the resident memory of a separate process, on one thread of the CPU, in float32.
"""
EXAMPLES = """\
examples:
  mmtoken flops configs/stvit_r/mask-rcnn_stvit-r-swin-s_fpn_8xb2-1x_coco.py
  mmtoken flops CFG --shape 1024 1024 --json flops.json
  mmtoken flops CFG --part model
  mmtoken flops configs/dge/mask-rcnn_dge-pvt-s_fpn_8xb2-1x_coco.py --ratio 0.43
  mmtoken flops MSVIT_CFG --ratio 0.2 0.4 0.6 0.8
  mmtoken flops CFG --shape 1024 1024 --memory

With --part model, the work of a detector's heads depends on how many proposals it makes untrained.
"""


def main() -> int:
    """Count, print a table; return 0, or 1 if nothing could be counted."""
    parser = make_parser(DESCRIPTION, EXAMPLES)
    parser.add_argument('--memory', action='store_true', help='also measure the peak memory')
    args = parser.parse_args()
    quieten()
    from benchmarking.step import Setting, make_images  # after the arguments are known to be good
    from benchmarking.targets import build_target, dense_target

    from mmtoken.analysis.configs import default_shape, load_config
    from mmtoken.analysis.environment import describe_environment

    batch_size, costs, peaks = num_ratios(args.ratio), {}, {}
    try:
        cfg = load_config(args.config)
        shape = tuple(args.shape or default_shape(cfg))
        setting = Setting(shape, batch_size)
        sparse = build_target(cfg, args.part, args.ratio, args.ratio_name)
        with Console(stderr=True).status('counting'):
            for name, target in (('sparse', sparse), ('dense', dense_target(sparse))):
                costs[name] = target.measure_cost(target.build(), make_images(target, setting))
                if args.memory:
                    peaks[name] = measure_peaks(target, setting)
    except (OSError, ValueError) as error:
        return fail(error)
    number = 'one image' if batch_size == 1 else f'mean of {batch_size} images'
    title = ', '.join([f'{number} of {shape[0]} x {shape[1]}', *routing_words(sparse.routing)])
    report(sparse.name, args.part, title, **costs)
    line = routing_line(sparse.routing, costs['sparse'].ratios)
    if line:
        Console().print(line)
    memory = {}
    if args.memory:
        memory = dict(peak_mb=peaks, environment=describe_environment(setting.device))
        Console().print(f'Peak memory in MiB: {peak_words(**peaks)}.')
    write_json(
        args.json,
        dict(
            config=Path(args.config).name,
            part=args.part,
            shape=list(shape),
            batch_size=batch_size,
            mac_ratio=costs['dense'].macs / costs['sparse'].macs,
            **sparse.routing,
            **{name: cost.to_dict() for name, cost in costs.items()},
            **memory,
        ),
    )
    return 0


def measure_peaks(target, setting) -> dict[str, float]:
    """MiB of a forward pass and of a training step."""
    from benchmarking.memory import peak_on_cpu

    steps = {'forward pass': setting, 'training step': replace(setting, train=True)}
    return {name: peak_on_cpu(target, step) for name, step in steps.items()}


def peak_words(sparse: dict, dense: dict) -> str:
    """``'forward pass 49 / 72, training step 571 / 779'``, the dense twin second."""
    return ', '.join(f'{step} {sparse[step]:.0f} / {dense[step]:.0f}' for step in sparse)


def report(name: str, part: str, title: str, sparse, dense) -> None:
    """Print the table; ``title`` says for which images."""
    from mmtoken.analysis.cost import KINDS

    console = Console()
    unit, scale = ('G', 1e9) if dense.macs >= 1e10 else ('M', 1e6)
    whole = name if part == 'backbone' else f'Model with {name}'
    table = Table(
        title=f'{whole} / dense twin: {unit} MACs, {title}',
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column('part', no_wrap=True)
    for column in (*KINDS, 'all', 'ratio'):
        table.add_column(column, justify='right', no_wrap=True)
    nothing = dict.fromkeys(KINDS, 0)
    for stage in dict.fromkeys([*sparse.stages, *dense.stages]):
        table.add_row(
            stage,
            *_cells(sparse.stages.get(stage, nothing), dense.stages.get(stage, nothing), scale),
        )
    table.add_section()
    table.add_row('all', *_cells(sparse.by_kind(), dense.by_kind(), scale), style='bold')
    console.print(table)
    for network, cost in ((whole, sparse), ('dense twin', dense)):
        extra = cost.to_dict()['executed_extra']
        console.print(
            f'{network}: {cost.macs / scale:.2f} {unit} MACs '
            f'(executed {cost.executed / scale:.2f} {unit}, {extra / cost.macs:+.1%}), '
            f'{cost.parameters / 1e6:.2f} M params'
        )


def _cells(sparse: dict[str, int], dense: dict[str, int], scale: float) -> list[str]:
    """Sparse and dense MACs of each kind and of all, and their ratio."""
    pairs = [(sparse[kind], dense[kind]) for kind in sparse]
    pairs.append((sum(sparse.values()), sum(dense.values())))
    ratio = f'{pairs[-1][1] / pairs[-1][0]:.2f}' if all(pairs[-1]) else ''
    cells = [f'{figure(a / scale)} / {figure(b / scale)}' if a or b else '' for a, b in pairs]
    return [*cells, ratio]


if __name__ == '__main__':
    sys.exit(main())
