"""What the package knows about a family of foreign checkpoints."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Renamed = dict[str, tuple[str, Tensor]]  # new name: (old name, tensor)
Rename = Callable[[Mapping[str, Tensor]], Renamed]
Rule = tuple[str, str | Callable[[re.Match], str] | None]


@dataclass(frozen=True)
class Layout:
    """One project's names for a family of models.

    Attributes:
        name: Whose names these are.
        marks: Regular expressions; the layout is recognised where each matches some name.
        rename: Whole state dict to ours.
    """

    name: str
    marks: tuple[str, ...]
    rename: Rename

    def fits(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(matches(mark, name) for name in names) for mark in self.marks)


@dataclass(frozen=True)
class Source:
    """A family of foreign checkpoints. All patterns are regular expressions for names of ours.

    Attributes:
        name: As given to :func:`mmtoken.checkpoints.convert`.
        layouts: Whose names its files may have, the most telling first.
        names: What such files hold. Anything else is from a variant that we do not have.
        unused: What a model of ours may have no place for.
        fresh: What a model of ours has beyond what such files hold, in groups: a file may lack all
            of a group, not some of it.
        sign: What a file has that is taken for this family unasked; by default nothing beyond the
            marks of a layout.
        check: Raises a ValueError if names and tensors of a file, as they are there, are not for a
            model, in a way that names and shapes do not tell.
    """

    name: str
    layouts: tuple[Layout, ...]
    names: str
    unused: str | None = None
    fresh: tuple[str, ...] = ()
    sign: str | None = None
    check: Callable[[Mapping[str, Tensor], nn.Module], None] | None = None

    def layout_of(self, names: Iterable[str]) -> Layout | None:
        """The layout that these names have, if any of this source."""
        names = list(names)
        return next((layout for layout in self.layouts if layout.fits(names)), None)

    def claims(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is taken for this family unasked."""
        names = list(names)
        signed = self.sign is None or any(matches(self.sign, name) for name in names)
        return signed and self.layout_of(names) is not None


def rename_with(*rules: Rule) -> Rename:
    """Make a ``rename`` from (regular expression, replacement); None drops the name.

    The first rule that matches the beginning of a name is applied; a name that none matches stays.
    A replacement is one of :func:`re.sub`.
    """

    def rename(state: Mapping[str, Tensor]) -> Renamed:
        renamed: Renamed = {}
        for name, tensor in state.items():
            new = _apply(rules, name)
            if new in renamed:
                raise ValueError(f'{renamed[new][0]} and {name} both become {new}')
            if new is not None:
                renamed[new] = (name, tensor)
        return renamed

    return rename


def matches(pattern: str | None, name: str) -> bool:
    """Whether there is a pattern and it describes the whole name."""
    return pattern is not None and re.fullmatch(pattern, name) is not None


def is_square(number: int) -> bool:
    """Whether so many tokens make a grid with as many rows as columns."""
    return number > 0 and math.isqrt(number) ** 2 == number


def _apply(rules: Iterable[Rule], name: str) -> str | None:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return None if replacement is None else re.sub(f'^{pattern}', replacement, name)
    return name
