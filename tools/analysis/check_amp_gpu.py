"""Compare token losses and gradients of routers in mixed precision with those in float32."""

import argparse
import copy
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from cli import HelpFormatter, fail, positive, quieten, write_json

DESCRIPTION = """\
Run the first training iterations of a config twice with MMEngine's runner, in float32 and in mixed
precision, and compare the published token losses and the gradients of the routers. On CUDA mixed
precision is AmpOptimWrapper with a dynamic loss scale, on a CPU bfloat16 without one.

The learning rate is 0 and each iteration has its own seed, so both runs see the same weights,
images and noise. Iterations whose scaled gradients overflow, which the scaler skips, are not
compared. The data set of the config is needed.
"""
PUBLISHED = re.compile('budget|ratio|shaping')
ROUTERS = re.compile('router|gate')
TOLERANCES = dict(value=0.02, gradient=0.1)  # relative; values below 0.1 count as 0.1


def main() -> int:
    """Compare and print; return 0 if all agrees, otherwise 1."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument('config', metavar='CFG', help='config of mmdet, mmseg or mmpretrain')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='where to run')
    parser.add_argument('--iters', type=positive, default=8, metavar='N', help='iterations')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results here as well')
    args = parser.parse_args()
    quieten()
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the runner takes a GPU if it sees one
    import torch  # after the arguments are known to be good
    from mmengine.config import Config

    from mmtoken.analysis.environment import describe_environment

    if args.device == 'cuda' and not torch.cuda.is_available():
        return fail('torch sees no CUDA device; --device cpu checks bfloat16 without a scaler')
    try:
        cfg = Config.fromfile(args.config)
        rows, skipped = compare(*(run(cfg, args.iters, args.device, m) for m in (False, True)))
    except (OSError, ValueError) as error:
        return fail(error)
    for row in rows:
        verdict = 'good' if row['good'] else 'BAD'
        print(f'{row["name"]}: differs by {row["difference"]:.2g} of {row["allowed"]:g}, {verdict}')
    print(f'{args.iters} iterations, {skipped} of them overflowed.')
    results = dict(config=Path(args.config).name, iters=args.iters, skipped=skipped, compared=rows)
    environment = describe_environment(torch.device(args.device))
    write_json(args.json, results | dict(environment=environment))
    return 0 if all(row['good'] for row in rows) else 1


def run(cfg, iters: int, device: str, mixed: bool) -> list[dict]:
    """Published values of each iteration and, as ``'gradient'``, unscaled gradients of all routers.

    Raises:
        ValueError: The model publishes nothing, or no router has a gradient.
    """
    import torch
    from mmengine.hooks import Hook
    from mmengine.optim import OptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    @OPTIM_WRAPPERS.register_module(force=True)
    class CpuAmpOptimWrapper(OptimWrapper):  # MMEngine's needs a GPU
        def optim_context(self, model):
            return torch.autocast('cpu', torch.bfloat16)

    iterations, gradients = [], {}

    class Record(Hook):
        def before_train(self, runner):
            # The optimizer's wrapper releases gradients before it calls any hook of the runner.
            for name, parameter in runner.model.named_parameters():
                if parameter.requires_grad and ROUTERS.search(name):
                    parameter.register_hook(partial(store, name))

        def before_train_iter(self, runner, *args, **kwargs):
            torch.manual_seed(runner.iter)
            scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
            self.scale = scaler.get_scale() if scaler else 1.0  # the step may change it

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            values = {name: float(v) for name, v in outputs.items() if PUBLISHED.search(name)}
            if not values or not gradients:
                raise ValueError('the model publishes nothing, or no router has a gradient')
            flat = torch.cat([grad.flatten() for _, grad in sorted(gradients.items())])
            iterations.append(values | dict(gradient=flat / self.scale))
            gradients.clear()

    def store(name, grad):
        gradients[name] = grad.double().cpu()

    cfg = copy.deepcopy(cfg)
    for part in ('cfg', 'dataloader', 'evaluator'):
        cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
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
        runner.register_hook(Record())
        runner.train()
    return iterations


def compare(full: list[dict], mixed: list[dict]) -> tuple[list[dict], int]:
    """The greatest relative difference of each value, and the number of skipped iterations.

    Raises:
        ValueError: All iterations overflowed.
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
