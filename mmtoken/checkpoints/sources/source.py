"""What the package knows about a family of foreign checkpoints."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

State = Mapping[str, Tensor]  # names and tensors
Renamed = dict[str, tuple[str, Tensor]]  # new name: (old name, tensor)
Rename = Callable[[Mapping[str, Tensor]], Renamed]
Rule = tuple[str, str | Callable[[re.Match], str] | None]


@dataclass(frozen=True)
class Layout:
    """One project's names for a family of models.

    Attributes:
        name: Whose names these are.
        signature_keys: Regular expressions, each of which must match a name.
        rename: Whole state dict to ours.
    """

    name: str
    signature_keys: tuple[str, ...]
    rename: Rename

    def matches(self, names: Collection[str]) -> bool:
        """Whether names are of this layout."""
        return all(matches_any(key, names) for key in self.signature_keys)


@dataclass(frozen=True)
class Source:
    """A family of foreign checkpoints. All patterns are regular expressions for names of ours.

    Attributes:
        name: As given to :func:`mmtoken.checkpoints.convert`.
        layouts: Whose names its files may have, the most specific first.
        known_keys: What such files hold. Anything else is from a variant that is not supported.
        ignorable_keys: What a model of ours may have no parameter for.
        newly_initialized_keys: What a model of ours has beyond such files, in groups: a file may
            lack all keys of a group, but not only some.
        key_signature: A key that a file must have to be detected as of this family, beside those of
            a layout. It is not asked for where the user names the source.
        check: Raises a ValueError where the arguments of a model do not suit the names and tensors
            of a file, as they are in the file and as they are renamed, although names and shapes
            fit.
    """

    name: str
    layouts: tuple[Layout, ...]
    known_keys: str
    ignorable_keys: str | None = None
    newly_initialized_keys: tuple[str, ...] = ()
    key_signature: str | None = None
    check: Callable[[State, State, nn.Module], None] | None = None

    def layout_of(self, names: Collection[str]) -> Layout | None:
        """The layout that these names have, if any of this source."""
        return next((layout for layout in self.layouts if layout.matches(names)), None)

    def matches(self, names: Collection[str]) -> bool:
        """Whether a file with these names is detected as of this family."""
        signed = self.key_signature is None or matches_any(self.key_signature, names)
        return signed and self.layout_of(names) is not None


def rename_with(*rules: Rule) -> Rename:
    """Make a ``rename`` from (regular expression, replacement); None drops the name.

    The first rule that matches the beginning of a name applies; other names stay. Replacements are
    those of :func:`re.sub`.
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


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern describes one of the names as a whole."""
    return any(re.fullmatch(pattern, name) for name in names)


def is_square(number: int) -> bool:
    """Whether so many tokens make a grid with as many rows as columns."""
    return number > 0 and math.isqrt(number) ** 2 == number


def _apply(rules: Iterable[Rule], name: str) -> str | None:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return None if replacement is None else re.sub(f'^{pattern}', replacement, name)
    return name
