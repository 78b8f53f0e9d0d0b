"""The rows of the study: which network, on which images."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import levers  # noqa: F401  registers the backbones that some rows name
import yaml
from mmengine.config import Config
from mmengine.runner.checkpoint import find_latest_checkpoint

from mmtoken import routing_override
from mmtoken.analysis.configs import load_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / 'results'


@dataclass(frozen=True)
class Row:
    """A network and how it is trained.

    Attributes:
        task: File of the rows, such as ``'ccp'``.
        name: In that file.
        config: Path, from the root of the repository.
        options: Changes of the config, as for ``--cfg-options``.
        size: Height and width that a segmenter's photographs are resized to; None for those of the
            config.
        override: Arguments of :func:`mmtoken.routing_override`: random choices, not learned ones.
        plot: Whether it is in the plot; others are in the tables alone.
        title: In words, in the table of means; None for a row that is not in it.
    """

    task: str
    name: str
    config: str
    options: dict = field(default_factory=dict)
    size: tuple[int, int] | None = None
    override: dict | None = None
    plot: bool = True
    title: str | None = None

    def load(self, seed: int) -> Config:
        """The config of one training, which goes on from its last checkpoint if there is one.

        Raises:
            ValueError: A size for a detector.
        """
        cfg = load_config(ROOT / self.config)
        cfg.merge_from_dict(dict(self.options))
        if self.size:
            resize(cfg, *self.size)
        cfg.work_dir = str(self.work_dir(seed))
        cfg.randomness = dict(seed=seed)
        if (self.work_dir(seed) / 'last_checkpoint').exists():
            # Not left to the runner, which would resume from weights that training starts from.
            cfg.load_from, cfg.resume = find_latest_checkpoint(cfg.work_dir), True
        return cfg

    def choices(self) -> AbstractContextManager:
        """Within it, a network chooses as the row says."""
        return routing_override(**self.override) if self.override else nullcontext()

    def work_dir(self, seed: int) -> Path:
        """Where checkpoints and logs go."""
        return Path('work_dirs', 'study', self.task, f'{self.name}_seed{seed}')

    def result(self, seed: int) -> Path:
        """Where scores go."""
        return RESULTS / self.task / f'{self.name}_seed{seed}.json'


KEYS = {each.name for each in fields(Row)} - {'task', 'name'}  # of a row, in its file


def tasks() -> list[str]:
    """Names of all files of rows."""
    return sorted(path.stem for path in HERE.glob('*.yml'))


def read_rows(task: str) -> dict[str, Row]:
    """The rows of a task by name.

    Raises:
        ValueError: A row has keys that are not known, or no config.
    """
    document = yaml.safe_load((HERE / f'{task}.yml').read_text())
    default = dict(config=document.get('config'))
    rows = {}
    for name, given in document['rows'].items():
        given = dict(given)
        base = rows[given.pop('base')] if 'base' in given else None
        if unknown := given.keys() - KEYS:
            raise ValueError(f'row {name} of {task}.yml has unknown keys {sorted(unknown)}')
        merged = default if base is None else dict(
            config=base.config, size=base.size, override=base.override
        )  # fmt: skip
        merged = merged | given
        if not merged['config']:
            raise ValueError(f'row {name} of {task}.yml needs a config; the file has none for all')
        merged['options'] = {**(base.options if base else {}), **given.get('options', {})}
        rows[name] = Row(task, name, **merged)
    return rows


def resize(cfg: Config, height: int, width: int) -> None:
    """Resize the photographs of a segmenter's config, in training and testing.

    Raises:
        ValueError: Its images have no fixed size, as those of a detector.
    """
    if 'size' not in cfg.model.data_preprocessor:
        raise ValueError(
            f'size {[height, width]} was given, which only segmenters have, not {cfg.model.type}'
        )
    cfg.model.data_preprocessor.size = (height, width)
    for part in ('train', 'val', 'test'):
        for transform in cfg[f'{part}_dataloader'].dataset.pipeline:
            if transform['type'] == 'Resize':
                transform['scale'] = (width, height)
