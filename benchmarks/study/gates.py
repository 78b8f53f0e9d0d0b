"""How well gates of several kinds find the regions whose labels change."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, init_default_scope
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import RESULTS, read_rows, tasks
from torch import Tensor, nn

from mmtoken.analysis.configs import build_model
from mmtoken.engine.sample_labels import labels_of_samples
from mmtoken.files import replacing
from mmtoken.layers.common.gate import RegionGate
from mmtoken.layers.common.labels import label_purity
from mmtoken.layers.common.regions import describe_regions

DESCRIPTION = """\
Train the gate of row `msvit` of a task alone, in several ways, and score how well it finds the
regions whose labels change, on the validation set. Printed and written to
benchmarks/study/results/TASK/gates.json:

  coverage   share of the pixels that differ from the label of their region which the 25 % of the
             regions with the highest scores hold: 0.25 for random regions, 1 at best
  of all     the same, for the 25 % of all regions of the validation set, with one threshold

This takes minutes: nothing but patch embeddings is computed of the network.
"""
MIN_PURITY = 0.95
FINE_RATIO = 0.25
WARM_UP = 15  # iterations


@dataclass(frozen=True)
class Setting:
    """How a gate is built and trained; one that reads the deviation of pixels is not trained.

    With ``warm_start`` it first learns, for as long, in which regions pixels deviate most.
    """

    name: str
    input: str = 'patches'
    warm_start: bool = False
    kernel_size: int = 3
    lr: float = 1e-2
    start_ratio: float = 0.75
    iterations: int = 150
    batch_size: int = 2


SETTINGS = (
    Setting('none: standard deviation of the pixels', input='deviation'),
    Setting('sees 3×3 regions'),
    Setting('the same, learned the deviation of pixels before', warm_start=True),
    Setting('learning rate 1e-3', lr=1e-3),
    Setting('starts with 10 % coarse, 1e-3', lr=1e-3, start_ratio=0.1),
    Setting('reads the coarse embedding', input='embed'),
    Setting('sees no neighbors', kernel_size=1),
    Setting('as in the config: sees 5×5 regions', kernel_size=5),
    Setting('ten times the photographs', lr=3e-3, iterations=750, batch_size=4),
)


def main() -> int:
    """Train all gates, print and write their coverage; return 0."""
    args = parse_args()
    torch.set_num_threads(1)
    row = read_rows(args.task)['msvit']
    cfg = row.load(0)
    cfg.merge_from_dict(args.cfg_options or {})
    init_default_scope(cfg.default_scope)
    model = build_model(cfg.model)
    model.init_weights()
    model.eval()
    train, val = (list(read_regions(cfg, model, part, args.photos)) for part in ('train', 'val'))
    results = []
    for setting in track(SETTINGS, 'Training gates'):
        found = [coverage(train_gate(setting, train, seed), setting, val) for seed in args.seeds]
        means = torch.tensor(found).mean(dim=0).tolist()
        results.append(asdict(setting) | dict(coverage=means[0], coverage_of_all=means[1]))
    with replacing(RESULTS / args.task / 'gates.json') as new:
        new.write_text(json.dumps(dict(seeds=args.seeds, settings=results), indent=2) + '\n')
    table = Table('gate', box=SIMPLE_HEAD)
    for column in ('coverage', 'of all'):
        table.add_column(column, justify='right')
    for result in results:
        figures = (f'{result[key]:.3f}' for key in ('coverage', 'coverage_of_all'))
        table.add_row(result['name'], *figures)
    Console().print(table)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=[t for t in tasks() if 'msvit' in read_rows(t)])
    parser.add_argument(
        '--photos', type=int, default=400, help='of the training set (default: 400)'
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='K=V',
        help='where this machine keeps weights',
    )  # fmt: skip
    return parser.parse_args()


def read_regions(
    cfg: Config, model: nn.Module, part: str, number: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """What gates read of each photograph, and the purity of its regions, ``(Hr, Wr)``."""
    settings = dict(cfg[f'{part}_dataloader'].dataset)
    # That of training, where labels have the size of the images
    pipeline = cfg.train_dataloader.dataset.pipeline
    settings['pipeline'] = [t for t in pipeline if t['type'] != 'RandomFlip']
    dataset = DATASETS.build(settings)
    backbone, ratio = model.backbone, model.backbone.ratio
    for index in track(range(min(number, len(dataset))), f'Reading {part}'):
        item = dataset[index]
        item = dict(inputs=[item['inputs']], data_samples=[item['data_samples']])
        batch = model.data_preprocessor(item, True)
        images = batch['inputs']
        labels = labels_of_samples(batch['data_samples'], tuple(images.shape[-2:]))
        pixels = describe_regions(images.permute(0, 2, 3, 1), backbone.patch_size * ratio)[0]
        _, deviation = pixels.chunk(2, dim=-1)
        with torch.no_grad():
            seen = dict(
                deviation=deviation.mean(dim=-1, keepdim=True),
                embed=backbone.embed_coarse(images)[0],
                patches=describe_regions(backbone.patch_embed(images), ratio)[0],
            )
        purity, _ = label_purity(labels, backbone.patch_size * ratio)
        yield seen, purity[0]


class DeviationGate(nn.Module):
    """Wants fine tokens where pixels deviate: ``(B, Hr, Wr, 1) -> (B, Hr, Wr, 2)``."""

    def forward(self, deviation: Tensor) -> Tensor:
        return torch.cat([deviation, torch.zeros_like(deviation)], dim=-1)


def train_gate(setting: Setting, photos: list, seed: int) -> nn.Module:
    """A gate trained on region labels alone, with the schedule of the configs."""
    torch.manual_seed(seed)
    if setting.input == 'deviation':
        return DeviationGate()
    channels = photos[0][0][setting.input].shape[-1]
    gate = RegionGate(channels, start_ratio=setting.start_ratio, kernel_size=setting.kernel_size)
    inputs = [seen[setting.input] for seen, _ in photos]
    if setting.warm_start:
        fit(gate, setting, inputs, [is_quiet(seen['deviation'][..., 0]) for seen, _ in photos])
    fit(gate, setting, inputs, [purity >= MIN_PURITY for _, purity in photos])
    return gate.eval()


def is_quiet(deviation: Tensor) -> Tensor:
    """Regions that are not among those whose pixels deviate most, ``(Hr, Wr)``."""
    return deviation < deviation.quantile(1 - FINE_RATIO)


def fit(gate: nn.Module, setting: Setting, inputs: list[Tensor], coarse: list[Tensor]) -> None:
    """Teach a gate which regions of photographs are coarse.

    Args:
        gate: To be trained.
        setting: How.
        inputs: What it reads of each photograph, ``(Hr, Wr, C)``.
        coarse: Its target, ``(Hr, Wr)``, bool.
    """
    optimizer = torch.optim.AdamW(gate.parameters(), setting.lr, weight_decay=0.05)
    order = torch.randperm(len(inputs)).tolist()
    for step in range(setting.iterations):
        warm_up = min(1, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group['lr'] = setting.lr * warm_up * (1 - step / setting.iterations)
        first = step * setting.batch_size
        batch = [order[i % len(order)] for i in range(first, first + setting.batch_size)]
        seen = torch.stack([inputs[i] for i in batch])
        target = torch.stack([coarse[i] for i in batch]).long()
        if torch.rand(()) < 0.5:
            seen, target = seen.flip(2), target.flip(2)
        loss = F.cross_entropy(gate(seen).flatten(0, 2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def coverage(gate: nn.Module, setting: Setting, photos: list) -> tuple[float, float]:
    """Share of impurity in the best regions of each photograph, and of all photographs."""
    scores = torch.stack([gate(seen[setting.input][None])[0] for seen, _ in photos])
    needs = (scores[..., 0] - scores[..., 1]).flatten(1)
    impurity = torch.stack([1 - purity for _, purity in photos]).flatten(1)
    return tuple(
        covered(n, i) for n, i in ((needs, impurity), (needs.view(1, -1), impurity.view(1, -1)))
    )


def covered(needs: Tensor, impurity: Tensor) -> float:
    """Share of impurity in the regions of each row that need fine tokens most."""
    best = needs.topk(round(FINE_RATIO * needs.shape[1]), dim=1).indices
    return (impurity.gather(1, best).sum() / impurity.sum()).item()


if __name__ == '__main__':
    raise SystemExit(main())
