"""What became of the tensors of a checkpoint."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

Shape = tuple[int, ...]
OURS = 'mmtoken'  # layout of files that have our names without being of the same module
SHOWN = 8  # groups of names in a list
WIDTH = 100  # of a table as text


@dataclass
class Report:
    """What became of the tensors of a checkpoint.

    Attributes:
        source: Family the file was taken for, such as ``'swin'``; None if its names are those of
            the module already.
        layout: Whose names the file had.
        mapped: Names of ours to names in the file.
        resized: Names of ours to the shape in the file and the new one.
        split: Names in the file of joint projections that were split into query and key-value, or
            of which the model has the value only.
        joined: Names in the file of projections that were joined.
        neutral: Names of ours that the file does not have, set so that its weights do as before.
        dropped: Names in the file that were left out.
        unknown: Names in the file that the layout does not know; they are kept as they are.
        fresh: Names of ours that the file does not have, and that keep their initial values.
        kept: Names in the file of necks and heads, which stay as they are.
        grids: Names of positions to the grid, ``(H, W)`` in tokens, that the module takes over.
        channels: Of the image, in the file and in the model, where they differ.
    """

    source: str | None = None
    layout: str = ''
    mapped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    split: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    neutral: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    channels: tuple[int, int] | None = None

    @property
    def origin(self) -> str:
        """Family and layout in words."""
        return f'{self.source} ({self.layout} names)' if self.source else "the module's own names"

    @property
    def is_ours(self) -> bool:
        """Whether the names in the file are ours."""
        return self.source is None or self.layout == OURS

    def summary(self) -> str:
        """One line for a log."""
        parts = [f'{self.origin}: {len(self.mapped)} tensors']
        for what, names in (
            ('split', self.split),
            ('joined', self.joined),
            ('resized', self.resized),
            ('dropped', self.dropped),
            ('neutral', self.neutral),
            ('fresh', self.fresh),
        ):
            if names:
                parts.append(f'{len(names)} {what} ({", ".join(group_names(names))})')
        parts += self._notes()
        return '; '.join(parts)

    def describe_grids(self) -> str:
        """What became of positions that are laid out on another grid than the model's."""
        grids = ', '.join(f'{name} {h} x {w}' for name, (h, w) in self.grids.items())
        return f"positions keep the file's grid, and the model's img_size is changed to it: {grids}"

    def _notes(self) -> list[str]:
        notes = [self.describe_grids()] if self.grids else []
        if self.channels:
            notes.append(
                'the first layer takes {1} channels, from weights for {0}'.format(*self.channels)
            )
        return notes

    def __rich__(self) -> Table:
        table = Table(title=f'Read as {self.origin}', title_justify='left')
        table.add_column('what')
        table.add_column('tensors', justify='right')
        table.add_column('which', overflow='fold')
        resized = Counter(
            f'{generalise(name)} {old} -> {new}' for name, (old, new) in self.resized.items()
        )
        for what, count, which in (
            ('mapped', len(self.mapped), group_names(self.mapped)),
            ('split', len(self.split), group_names(self.split)),
            ('joined', len(self.joined), group_names(self.joined)),
            ('resized', len(self.resized), _count_each(resized)),
            ('kept', len(self.kept), group_names(self.kept)),
            ('dropped', len(self.dropped), group_names(self.dropped)),
            ('unknown', len(self.unknown), group_names(self.unknown)),
            ('neutral', len(self.neutral), group_names(self.neutral)),
            ('fresh', len(self.fresh), group_names(self.fresh)),
        ):
            if count:
                table.add_row(what, str(count), '\n'.join(which))
        for note in self._notes():
            table.add_row('note', '', note)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH).print(self)
        return '\n'.join(line.rstrip() for line in text.getvalue().splitlines())


def group_names(names: Iterable[str]) -> list[str]:
    """Shorten a list: indices become ``*``, and if that leaves too many, all but the first part."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(generalise(name), []).append(name)
    if len(patterns) <= SHOWN:
        return _count_each({p if len(ns) > 1 else ns[0]: len(ns) for p, ns in patterns.items()})
    groups: Counter[str] = Counter()
    for pattern, group in patterns.items():
        root, dot, _ = pattern.partition('.')
        groups[f'{root}.*' if dot else root] += len(group)
    return _count_each(groups)


def generalise(name: str) -> str:
    """``layers.2.blocks.11.norm1.weight`` to ``layers.*.blocks.*.norm*.weight``."""
    return re.sub(r'\d+(?=\.|$)', '*', name)


def _count_each(groups: Mapping[str, int]) -> list[str]:
    """The first groups, each with its number where that is not 1."""
    items = [f'{name} x {count}' if count > 1 else name for name, count in groups.items()]
    return items[:SHOWN] + ([f'and {len(items) - SHOWN} more'] if len(items) > SHOWN else [])
