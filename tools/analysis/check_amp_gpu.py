"""Token losses and the gradients of routers in mixed precision beside those in float32."""

import argparse
import copy
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from cli import HelpFormatter, fail, positive, quieten, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DESCRIPTION = """\
Run the first training iterations of a config twice through MMEngine's runner, in float32 and in
mixed precision, and compare what its tokens publish and the gradients of its routers. On CUDA mixed
precision is AmpOptimWrapper with a dynamic loss scale, on a CPU bfloat16 without one.

The learning rate is 0 and random numbers start anew in each iteration, so that both runs see the
same weights, images and noise. Iterations whose scaled gradients overflow, which the scaler skips,
are counted but not compared. The data set of the config must be there.
"""
EXAMPLES = """\
examples:
  python tools/analysis/check_amp_gpu.py CFG --json amp.json
  python tools/analysis/check_amp_gpu.py CFG --device cpu --iters 2
"""
PUBLISHED = re.compile('budget|ratio|shaping')
ROUTERS = re.compile('router|gate')
LOOP_PARTS = ('cfg', 'dataloader', 'evaluator')
TOLERANCES = dict(value=0.02, gradient=0.1)  # relative; values below 0.1 count as 0.1


def main() -> int:
    """Compare, print a table; return 0 if all agrees, 1 if not or if nothing could be run."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument('config', metavar='CFG', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='where to run')
    parser.add_argument('--iters', type=positive, default=8, metavar='N', help='iterations')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here as well')
    args = parser.parse_args()
    quieten()
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the runner takes a GPU where it sees one
    import torch  # after the arguments are known to be good
    from mmengine.config import Config

    from mmtoken.analysis.environment import describe_environment

    if args.device == 'cuda' and not torch.cuda.is_available():
        return fail('torch sees no CUDA device here; --device cpu checks bfloat16 without a scaler')
    try:
        cfg = Config.fromfile(args.config)
        rows, skipped = compare(*(run(cfg, args.iters, args.device, m) for m in (False, True)))
    except (OSError, ValueError) as error:
        return fail(error)
    table = Table(title='Mixed precision beside float32', box=SIMPLE_HEAD, pad_edge=False)
    for column in ('', 'greatest difference', 'allowed', 'good'):
        table.add_column(column, justify='right' if column else 'left')
    for name, difference, allowed, good in (row.values() for row in rows):
        table.add_row(name, f'{difference:.2g}', f'{allowed:g}', 'yes' if good else 'NO')
    Console().print(table, f'{args.iters} iterations, {skipped} of them overflowed and left out.')
    results = dict(config=Path(args.config).name, iters=args.iters, skipped=skipped, compared=rows)
    environment = describe_environment(torch.device(args.device))
    write_json(args.json, results | dict(environment=environment))
    return 0 if all(row['good'] for row in rows) else 1


def run(cfg, iters: int, device: str, mixed: bool) -> list[dict]:
    """What is published in each iteration, and ``'gradient'``: of all routers, flat, unscaled.

    Raises:
        ValueError: There is nothing to compare.
    """
    import torch
    from mmengine.hooks import Hook
    from mmengine.optim import OptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    @OPTIM_WRAPPERS.register_module(force=True)
    class CpuAmpOptimWrapper(OptimWrapper):  # MMEngine's refuses to work without a GPU
        def optim_context(self, model):
            return torch.autocast('cpu', torch.bfloat16)

    seen, gradients = [], {}

    class Watch(Hook):
        def before_train(self, runner):
            # The optimiser's wrapper releases gradients before any hook of the runner is called.
            for name, parameter in runner.model.named_parameters():
                if parameter.requires_grad and ROUTERS.search(name):
                    parameter.register_hook(partial(keep, name))

        def before_train_iter(self, runner, *args, **kwargs):
            torch.manual_seed(runner.iter)
            scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
            self.scale = scaler.get_scale() if scaler else 1.0  # the step may change it

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            values = {name: float(v) for name, v in outputs.items() if PUBLISHED.search(name)}
            if not values or not gradients:
                raise ValueError('this model publishes nothing, or no router got a gradient')
            flat = [grad.flatten() for _, grad in sorted(gradients.items())]
            seen.append(values | dict(gradient=torch.cat(flat) / self.scale))
            gradients.clear()

    def keep(name, grad):
        gradients[name] = grad.double().cpu()

    cfg = copy.deepcopy(cfg)
    cfg.update({f'{s}_{p}': None for s in ('val', 'test') for p in LOOP_PARTS})
    cfg.train_cfg = dict(by_epoch=False, max_iters=iters)
    cfg.param_scheduler = None
    cfg.randomness = dict(seed=0)
    cfg.experiment_name = f'check_amp_{mixed}'
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    kept = ('optimizer', 'paramwise_cfg', 'constructor', 'clip_grad')
    wrapper = {key: cfg.optim_wrapper[key] for key in kept if key in cfg.optim_wrapper}
    wrapper['optimizer']['lr'] = 0.0
    if mixed and device == 'cuda':
        wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    elif mixed:
        wrapper.update(type='CpuAmpOptimWrapper')
    cfg.optim_wrapper = wrapper
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        runner.register_hook(Watch())
        runner.train()
    return seen


def compare(full: list[dict], mixed: list[dict]) -> tuple[list[dict], int]:
    """One row for each value and for the gradients, and how many iterations overflowed.

    Raises:
        ValueError: All of them.
    """
    pairs = [(a, b) for a, b in zip(full, mixed, strict=True) if b['gradient'].isfinite().all()]
    if not pairs:
        raise ValueError(f'all {len(full)} iterations overflowed; allow more with --iters')
    rows = []
    for name in pairs[0][0]:
        if name == 'gradient':
            errors = [float((a[name] - b[name]).norm() / a[name].norm()) for a, b in pairs]
        else:
            errors = [abs(a[name] - b[name]) / max(abs(a[name]), 0.1) for a, b in pairs]
        allowed = TOLERANCES['gradient' if name == 'gradient' else 'value']
        good = all(error <= allowed for error in errors)
        rows.append(dict(name=name, difference=max(errors), allowed=allowed, good=good))
    return rows, len(full) - len(pairs)


if __name__ == '__main__':
    sys.exit(main())
