"""Find where a PSViT should pool tokens and which layers should share a map, within a budget."""

import argparse
import copy
import hashlib
import io
import json
import logging
import os
import random
import sys
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'analysis'))
from cli import HelpFormatter, fail, positive, quieten, write_json
from compare import METRICS

DESCRIPTION = """\
Search for the layout of a PSViT: how many layers each stage has, and which of them share an
attention map, so that the score is high and the backbone stays within a budget of
multiply-accumulates (MACs). The paper searches too; how it does was not to be had, so all of this
is ours.

CONFIG names data, metric, schedule and the widths of the stages. Its backbone, a PSViT, has in each
stage as many layers as a layout can have there; take more than the network is to have.

1. A weight-sharing network, whose every layer can compute a map of its own, is trained by
   MMEngine's Runner as CONFIG says, with another layout in each iteration, drawn uniformly from all
   that have as many layers, within the budget or not. It is not validated meanwhile.
2. Layouts within the budget evolve, scored with the weights of that network by CONFIG's evaluator
   on the first images of its validation set. Batch norms in heads keep the statistics of training.
3. The best layout becomes a config that inherits CONFIG, to be trained by itself.

Scores with shared weights only rank layouts, and the best of many scores on few images is too
high: what a layout is worth is known when its own network is trained. Two layouts that nobody
searched for are scored as well, with stages as deep in proportion as CONFIG's: one without sharing
and one in pairs.

DIR keeps everything. An interrupted search goes on where it was; a network that is trained and
layouts that are scored are used again, for another budget too. If CONFIG or one of --depth,
--max-group, --images, --metric and --seed is another than in DIR, the search is refused.
Runs in one process.
"""
EXAMPLES = """\
examples:
  python tools/misc/search_psvit.py \\
      configs/shapes/fpn_psvit-nano-supernet_1xb16-500i_shapes-128x128.py \\
      --macs 0.345 --work-dir work_dirs/search
  python tools/misc/search_psvit.py CFG --macs 0.33 --work-dir work_dirs/search --out mine.py
"""
SETTINGS = ('depth', 'max_group', 'images', 'metric', 'seed')
ROWS = 8
CONFIG = """\
{headline}
_base_ = '{base}'

model = dict(
    backbone=dict(
        arch=dict(
{arch}
        ),
        sharing='{sharing}',
    ),
)
"""


class Search:
    """What DIR knows: settings, the checkpoint of the trained network, scores of layouts.

    Args:
        file: Where it is kept.
        settings: On which scores depend.

    Raises:
        ValueError: The file is of other settings.
    """

    def __init__(self, file: Path, settings: dict) -> None:
        self.file = file
        self.settings = settings
        self.checkpoint: str | None = None
        self.metric: str | None = None
        self.scores: dict[tuple, float] = {}
        if file.exists():
            kept = json.loads(file.read_text())
            other = [name for name in settings if settings[name] != kept['settings'].get(name)]
            if other:
                names = ' and '.join(other).replace('_', '-')
                raise ValueError(f'{file} is of another {names}; take another --work-dir')
            self.checkpoint, self.metric = kept['checkpoint'], kept['metric']
            self.scores = {tuple(map(tuple, row['layout'])): row['score'] for row in kept['scores']}

    def save(self) -> None:
        """Write the file in one step, so that it is never half a file."""
        temporary = self.file.with_name(f'.{self.file.name}.{os.getpid()}')
        scores = [dict(layout=layout, score=score) for layout, score in self.scores.items()]
        kept = dict(settings=self.settings, checkpoint=self.checkpoint, metric=self.metric)
        write_json(temporary, dict(kept, scores=scores))
        temporary.replace(self.file)


def main() -> int:
    """Train, search, write the config; return 0, or 1 if there is no result."""
    args = parse_args()
    try:
        search_layout(args)
    except (OSError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail('interrupted; the same command goes on')
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG', type=Path, help='of mmdet, mmseg or mmpretrain')
    parser.add_argument(
        '--macs', type=float, required=True, metavar='G',
        help='budget: billions of MACs of the backbone, for one image of the size that '
        'tools/analysis/flops.py counts at',
    )  # fmt: skip
    parser.add_argument('--work-dir', type=Path, required=True, metavar='DIR')
    parser.add_argument(
        '--out', type=Path, metavar='FILE',
        help='config to write; never overwritten (default: DIR/CONFIG_searched.py)',
    )  # fmt: skip
    parser.add_argument(
        '--depth', type=positive, metavar='L',
        help='layers in all (default: half of those in CONFIG)',
    )  # fmt: skip
    parser.add_argument(
        '--metric', metavar='NAME',
        help=f'to be high (default: the first of {", ".join(METRICS)} that there is)',
    )  # fmt: skip
    for name, default, text in (
        ('--max-group', 3, 'layers that share a map at most'),
        ('--images', 64, 'to score a layout on'),
        ('--population', 16, 'layouts of a generation'),
        ('--generations', 6, 'how many, the first included, which is drawn at random'),
        ('--parents', 4, 'best layouts, of which the next generation is made'),
    ):
        parser.add_argument(name, type=positive, default=default, metavar='N', help=text)
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of all that is drawn')
    return parser.parse_args()


def search_layout(args: argparse.Namespace) -> None:
    """Train, search, write the config.

    Raises:
        OSError, ValueError: What is asked for cannot be done; the message says why.
    """
    from mmtoken.analysis.layout_search import LayoutSpace, measure_layer_costs
    from mmtoken.analysis.subject import default_shape, load_config

    cfg = load_config(args.config)
    sharing = (cfg.model.get('backbone') or {}).get('sharing') or 'auto'
    backbone = make_backbone(cfg)
    max_depths = tuple(len(stage.blocks) for stage in backbone.layers)
    args.depth = args.depth or max(len(max_depths), sum(max_depths) // 2)
    space = LayoutSpace(max_depths, args.depth, args.max_group)
    shape = default_shape(cfg)
    with Console(stderr=True).status('counting MACs'):
        costs = measure_layer_costs(backbone, shape)
    cheapest = min(map(costs.macs, space.even(space.max_group))) / 1e9
    if cheapest > args.macs:
        raise ValueError(
            f'no layout of {args.depth} layers is within {args.macs} G MACs at {shape[0]} x '
            f'{shape[1]}; the cheapest has {cheapest:.3f} G'
        )
    file = args.work_dir / 'search.json'
    out = args.out or args.work_dir / f'{args.config.stem}_searched.py'
    if out.exists() and not file.exists():
        raise FileExistsError(f'{out} exists; it is not overwritten')
    search = Search(file, dict(config=digest(cfg), **{name: vars(args)[name] for name in SETTINGS}))

    if search.checkpoint is None:
        search.save()
        search.checkpoint = train(cfg, space, args.work_dir / 'supernet', args.seed)
        search.save()
    found, beside = try_layouts(search, cfg, space, costs, args)
    if not found:
        raise ValueError(
            f'of {space.size} layouts none within {args.macs} G MACs was found; the cheapest has '
            f'{cheapest:.3f} G'
        )
    report(search, found, beside, costs, args, shape)
    best = max(found, key=found.get)
    headline = (
        f'# Found by tools/misc/search_psvit.py: {costs.macs(best) / 1e9:.3f} G MACs.\n'
        f'# With shared weights, {search.metric} {found[best]:.2f} on {args.images} images.'
    )
    arch = cfg.model.backbone.arch
    write_config(out, make_config(args.config, arch, best, sharing, out, headline))


def make_backbone(cfg):
    """The backbone of a config, every layer with a map of its own; the config is changed so.

    Raises:
        ValueError: It is no PSViT.
    """
    from mmengine.registry import MODELS, init_default_scope

    from mmtoken.analysis.twin import our_class
    from mmtoken.backbones.psvit import PSViT

    given = cfg.model.get('backbone') or {}
    if our_class(given) is not PSViT or 'arch' not in given:
        raise ValueError(f'the backbone must be a mmtoken.PSViT with an arch, got {dict(given)}')
    given.update(PSViT.twin_args)
    init_default_scope(cfg.default_scope)
    # mmpretrain keeps it beside the model
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    return MODELS.build(given).eval()


def digest(cfg) -> str:
    """Tells configs apart."""
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(cfg, space, folder: Path, seed: int) -> str:
    """Train the weight-sharing network, from its last checkpoint if there is one; the new last."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner, find_latest_checkpoint

    class DrawLayoutHook(Hook):
        """Another layout in each iteration, the same one in the same iteration of a resumed run."""

        def before_train_iter(self, runner, *args, **kwargs) -> None:
            rng = random.Random(f'{seed}, {runner.iter}')
            backbone_of(runner.model).set_layout(space.draw(rng))

    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(folder.resolve())
    for part in ('cfg', 'dataloader', 'evaluator'):
        cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
    last = find_latest_checkpoint(str(folder)) if folder.exists() else None
    if last is not None:
        cfg.load_from, cfg.resume = last, True
    runner = Runner.from_cfg(cfg)
    runner.register_hook(DrawLayoutHook())
    runner.train()
    checkpoint = find_latest_checkpoint(str(folder))
    if checkpoint is None:
        raise ValueError(
            f'{folder} has no checkpoint; CONFIG must have its Runner save the last one'
        )
    return os.path.relpath(checkpoint, folder.resolve().parent)


def backbone_of(model):
    """The PSViT inside a model."""
    from mmtoken.backbones.psvit import PSViT

    return next(module for module in model.modules() if isinstance(module, PSViT))


def try_layouts(search: Search, cfg, space, costs, args) -> tuple[dict, dict]:
    """Scores of the layouts that evolve, and of those without sharing and in pairs."""
    from mmengine.logging import MMLogger

    from mmtoken.analysis.layout_search import evolve, plain_layout

    quieten()
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # it listens to nobody else
    scorer, scores = Scorer(search, cfg, args.images, args.metric), []
    budget = args.macs * 1e9
    columns = (
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('layouts', total=args.population * args.generations + 2)

        def score(layout: tuple) -> float:
            scores.append(scorer(layout))
            text = f'best {search.metric} {max(scores):.2f}'
            progress.update(task, advance=1, description=text)
            return scores[-1]

        found = evolve(
            space, score, lambda layout: costs.macs(layout) <= budget,
            args.population, args.generations, args.parents, args.seed,
        )  # fmt: skip
        pairs = min(2, args.max_group)
        plain = [plain_layout(space, group, costs, budget) for group in (1, pairs)]
        beside = {layout: score(layout) for layout in plain}
        progress.update(task, total=len(scores))
    return found, beside


class Scorer:
    """Scores layouts with the weights of the trained network; those known are not scored again.

    Model and images are loaded when they are needed, and stay in memory.

    Args:
        search: Knows scores and the checkpoint, and learns new ones.
        cfg: Of the network.
        num_images: How many are looked at, at least.
        metric: Name of the score; None for the first known one.
    """

    def __init__(self, search: Search, cfg, num_images: int, metric: str | None) -> None:
        self.search = search
        self.cfg = cfg
        self.num_images = num_images
        self.asked = metric
        self.model = None

    def __call__(self, layout: tuple) -> float:
        """In points where the metric is known, 0 to 100.

        Raises:
            ValueError: The evaluator does not give the metric.
        """
        if layout not in self.search.scores:
            if self.model is None:
                self.load()
            self.search.scores[layout] = self.read(self.evaluate(layout))
            self.search.save()
        return self.search.scores[layout]

    def load(self) -> None:
        from mmengine.device import get_device
        from mmengine.evaluator import Evaluator
        from mmengine.registry import MODELS
        from mmengine.runner import Runner, load_checkpoint

        checkpoint = self.search.file.parent / self.search.checkpoint
        self.model = MODELS.build(self.cfg.model)
        load_checkpoint(self.model, str(checkpoint), map_location='cpu', logger='silent')
        self.model.to(get_device()).eval()
        loader = Runner.build_dataloader(self.cfg.val_dataloader)
        batch_size = self.cfg.val_dataloader.get('batch_size', 1)
        self.batches = list(islice(loader, -(-self.num_images // batch_size)))
        samples = [sample for batch in self.batches for sample in batch['data_samples']]
        metrics = self.cfg.val_evaluator
        self.evaluator = Evaluator(metrics if isinstance(metrics, list) else [metrics])
        self.evaluator.dataset_meta = loader.dataset.metainfo
        self.num_samples = len(samples)
        for metric in self.evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # mmdet's would miss all other images
                metric.img_ids = [sample.img_id for sample in samples]

    def evaluate(self, layout: tuple) -> dict[str, float]:
        import torch

        backbone_of(self.model).set_layout(layout)
        # pycocotools prints
        with torch.no_grad(), redirect_stdout(io.StringIO()):
            for batch in map(copy.deepcopy, self.batches):
                self.evaluator.process(self.model.val_step(batch), batch)
            return self.evaluator.evaluate(self.num_samples)

    def read(self, scores: dict[str, float]) -> float:
        if not scores:  # mmdet gives no figures where nothing is detected
            return 0.0
        names = [self.asked] if self.asked else METRICS
        name = next((name for name in names if name in scores), None)
        if name is None:
            raise ValueError(f'--metric must be one of {", ".join(scores)}; got {self.asked!r}')
        self.search.metric = name
        return METRICS.get(name, 1) * float(scores[name])


def report(search: Search, found: dict, beside: dict, costs, args, shape: tuple[int, int]) -> None:
    """Print the best layouts, and those nobody searched for."""
    table = Table(
        title=f'Layouts of {args.depth} layers, one image of {shape[0]} x {shape[1]}',
        box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column('layout', no_wrap=True)
    for column in (search.metric or 'score', 'G MACs', 'ratio'):
        table.add_column(column, justify='right', no_wrap=True)

    def add(name: str, layout: tuple, score: float) -> None:
        macs = costs.macs(layout)
        ratio = costs.macs([(1,) * sum(groups) for groups in layout]) / macs
        over = '' if macs <= args.macs * 1e9 else '*'
        table.add_row(
            f'{name}{draw(layout)}', f'{score:.2f}', f'{macs / 1e9:.3f}{over}', f'{ratio:.3f}'
        )

    for layout in sorted(found, key=found.get, reverse=True)[:ROWS]:
        add('', layout, found[layout])
    table.add_section()
    for name, (layout, score) in zip(('unshared ', 'pairs '), beside.items(), strict=False):
        add(name, layout, score)
    console = Console()
    console.print(table, markup=False)
    first = list(found.values())[: args.population]
    console.print(
        f'{len(found)} layouts tried, with shared weights on {args.images} images. The first '
        f'{len(first)}, drawn at random: mean {sum(first) / len(first):.2f}, best {max(first):.2f}.'
    )
    console.print("ratio: MACs with a map in every layer, over the layout's. *: over the budget")


def draw(layout: tuple) -> str:
    """``'[2·1 | 3]'``: groups with a dot between, poolings with a bar."""
    return f'[{" | ".join("·".join(map(str, groups)) for groups in layout)}]'


def make_config(base: Path, arch, layout: tuple, sharing: str, out: Path, headline: str) -> str:
    """A config that inherits another, with a layout in place of its own, for a file ``out``."""
    from mmtoken.backbones.psvit import PSViT

    path = Path(os.path.relpath(base.resolve(), out.resolve().parent)).as_posix()
    path = path if path.startswith('.') else f'./{path}'
    stages = PSViT.resolve_arch(arch)['stages']
    rows = [(dims, heads, groups) for (dims, heads, _), groups in zip(stages, layout, strict=True)]
    indent = ' ' * 12
    lines = [f'{indent}_delete_=True,'] if isinstance(arch, str) else []
    lines += [f'{indent}stages=[', *(f'{indent}    {row},' for row in rows), f'{indent}],']
    return CONFIG.format(headline=headline, base=path, arch='\n'.join(lines), sharing=sharing)


def write_config(out: Path, text: str) -> None:
    """Write a config.

    Raises:
        FileExistsError: There is another file.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    elif out.read_text() != text:
        raise FileExistsError(f'{out} exists and is another; give --out, nothing is repeated')
    print(f'The best layout is in {out}')
    print('Its _base_ is relative. Do not move it: the same command with --out configs/.../NAME.py')
    print('writes another one there, and repeats nothing.')


if __name__ == '__main__':
    sys.exit(main())
