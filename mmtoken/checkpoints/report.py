"""What became of the tensors of a checkpoint."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Shape = tuple[int, ...]
OURS = 'mmtoken'  # layout of files that have our names, but of another module
SHOWN = 8  # items of a list in a message


@dataclass
class Report:
    """What became of the tensors of a checkpoint.

    Attributes:
        source: Family that the file was read as, such as ``'swin'``; None if its names are those of
            the module already.
        layout: Whose names the file had.
        mapped: Names of ours to names in the file.
        split: Names in the file of joint projections that were split into query and key-value, or
            of which the model has the value only.
        joined: Names in the file of projections that were joined.
        folded_scales: Names in the file of LayerScale that was multiplied into the layer before it.
        resized: Names of ours to the shape in the file and the new one.
        kept: Names in the file of necks and heads, which stay as they are.
        dropped: Names in the file that were left out.
        unknown: Names in the file that the layout does not know; they are kept as they are.
        identity_init: Names of ours that the file does not have, initialized so that the weights of
            the file compute the same as before.
        newly_initialized: Names of ours that the file does not have, and that keep their initial
            values.
        grids: Names of positions to the grid, ``(H, W)`` in tokens, that the module takes over.
        channels: Of the image, in the file and in the model, where they differ.
    """

    source: str | None = None
    layout: str = ''
    mapped: dict[str, str] = field(default_factory=dict)
    split: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    folded_scales: list[str] = field(default_factory=list)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    identity_init: list[str] = field(default_factory=list)
    newly_initialized: list[str] = field(default_factory=list)
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
        for what, names in self._groups():
            if what != 'mapped':
                parts.append(f'{len(names)} {what} ({", ".join(group_names(names))})')
        return '; '.join([*parts, *self._notes()])

    def describe_grids(self) -> str:
        """What became of positions that are laid out on another grid than the model's."""
        grids = ', '.join(f'{name} {h} x {w}' for name, (h, w) in self.grids.items())
        return f"positions keep the file's grid, and the model's img_size is changed to it: {grids}"

    def __str__(self) -> str:
        """A table of several lines."""
        lines = [f'Read as {self.origin}']
        for what, names in self._groups():
            items = group_names(names)
            if what == 'resized':
                shapes = (f'{generalize(n)} {old} -> {new}' for n, (old, new) in names.items())
                items = shorten(_counted(Counter(shapes)))
            for i, item in enumerate(items):
                start = '' if i else f'{what:18}{len(names):>6}'
                lines.append(f'  {start:24}  {item}')
        return '\n'.join(lines + [f'  note: {note}' for note in self._notes()])

    def _groups(self) -> Iterator[tuple[str, dict | list]]:
        """Each attribute that has names of tensors."""
        for what, names in vars(self).items():
            if names and isinstance(names, dict | list) and what != 'grids':
                yield what.replace('_', ' '), names

    def _notes(self) -> list[str]:
        notes = [self.describe_grids()] if self.grids else []
        if self.channels:
            notes.append(
                'the first layer takes {1} channels, from weights for {0}'.format(*self.channels)
            )
        return notes


def group_names(names: Iterable[str]) -> list[str]:
    """Shorten a list: indices become ``*``, and if that leaves too many, all but the first part."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(generalize(name), []).append(name)
    groups = Counter({p if len(ns) > 1 else ns[0]: len(ns) for p, ns in patterns.items()})
    if len(groups) <= SHOWN:
        return list(_counted(groups))
    roots: Counter[str] = Counter()
    for pattern, group in patterns.items():
        root, dot, _ = pattern.partition('.')
        roots[f'{root}.*' if dot else root] += len(group)
    return shorten(_counted(roots))


def generalize(name: str) -> str:
    """``layers.2.blocks.11.norm1.weight`` to ``layers.*.blocks.*.norm*.weight``."""
    return re.sub(r'\d+(?=\.|$)', '*', name)


def shorten(items: Iterable[str]) -> list[str]:
    """The first items, and how many more there are."""
    items = list(items)
    return items[:SHOWN] + ([f'and {len(items) - SHOWN} more'] if len(items) > SHOWN else [])


def _counted(groups: Counter[str]) -> Iterator[str]:
    """Each name, with its number where that is not 1."""
    return (f'{name} x {count}' if count > 1 else name for name, count in groups.items())
