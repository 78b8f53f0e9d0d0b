"""Rename the tensors of a foreign checkpoint to ours."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .report import Report, group_names, shorten
from .sources import SOURCES


def convert(
    state_dict: Mapping[str, Tensor], source: str, prefix: str | None = None
) -> tuple[dict[str, Tensor], Report]:
    """Give the tensors of a foreign checkpoint our names, in our order of channels.

    Nothing is resized; :func:`~mmtoken.checkpoints.load_into` brings shapes to those of a model.

    Args:
        state_dict: Names and tensors.
        source: ``'stvit-r'``, ``'swat'``, ``'swin'``, ``'vtpack'``, ``'pvt'``, ``'rotary-vit'``,
            ``'dinov2'``, ``'deit'`` or ``'vit'``. The layout is recognized by the names.
        prefix: What precedes the backbone's names, see :func:`take_prefix`.

    Returns:
        Our names and tensors, and what became of the names.

    Raises:
        ValueError: An unknown source, names that are not of that source, or names beyond those
            that it knows.
    """
    weights, outside = take_prefix(state_dict, prefix)
    state, report = rename(weights, source)
    if report.unknown:
        extra = ', '.join(group_names(report.unknown))
        raise ValueError(f'this variant of {report.origin} is not supported; it has {extra}')
    report.dropped += outside
    return state, report


def rename(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], Report]:
    """As :func:`convert`, without a prefix; names beyond those known are kept and reported."""
    if source not in SOURCES:
        raise ValueError(f'source is {source!r}; known are {sorted(SOURCES)}')
    family = SOURCES[source]
    layout = family.layout_of(state)
    if layout is None:
        found = detect_source(state, prefix='')
        looks = f'they look like {found!r}' if found else 'they are of no known source'
        known = ', '.join(known.name for known in family.layouts)
        raise ValueError(
            f'these are not the names of a {source!r} checkpoint ({known}), {looks}; '
            f'names begin with {_beginnings(state)}'
        )
    renamed = layout.rename(state)
    report = Report(source, layout.name, mapped={new: old for new, (old, _) in renamed.items()})
    used = set(report.mapped.values())
    report.dropped = [name for name in state if name not in used]
    for new, (old, tensor) in renamed.items():
        if not re.fullmatch(family.known_keys, new):
            report.unknown.append(old)
        if tensor.numel() != state[old].numel():  # a 1 x 1 convolution as Linear is not resized
            report.resized[new] = (tuple(state[old].shape), tuple(tensor.shape))
    return {new: tensor for new, (_, tensor) in renamed.items()}, report


def detect_source(names: Iterable[str], prefix: str | None = None) -> str | None:
    """Recognize the family of a checkpoint by its names.

    Args:
        names: A state dict, or its names.
        prefix: What precedes the backbone's names, see :func:`take_prefix`.

    Returns:
        A source for :func:`convert`; None for other files, and for those without such a prefix.
    """
    try:
        stripped, _ = take_prefix(dict.fromkeys(names), prefix)
    except ValueError:
        return None
    return next((name for name, source in SOURCES.items() if source.matches(stripped)), None)


def take_prefix(
    state: Mapping[str, Tensor], prefix: str | None = None, usual: str = 'backbone.'
) -> tuple[dict[str, Tensor], list[str]]:
    """Keep what starts with ``prefix``, without it; ``'module.'`` in front of names is dropped.

    Args:
        state: Names and tensors.
        prefix: With or without the dot at its end. None takes ``usual`` if any name starts with it,
            and otherwise everything.
        usual: What precedes the names of such a module in a whole model.

    Returns:
        Names and tensors that were kept, and the other names.

    Raises:
        ValueError: No name starts with ``prefix``.
    """
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    if prefix is None:
        prefix = usual if any(name.startswith(usual) for name in state) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    taken = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if not taken:
        raise ValueError(
            f'no name starts with prefix {prefix!r}; names start with {_beginnings(state)}'
        )
    return taken, [name for name in state if not name.startswith(prefix)]


def keep_outside(
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    report: Report,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """Weights of a whole model: those of a converted backbone, and necks and heads as they were.

    Args:
        state: Of the backbone.
        weights: Of the whole model in the file.
        report: Of the conversion; necks and heads are moved from its ``dropped`` to its ``kept``.
        prefix: What precedes the backbone's names in the file, see :func:`take_prefix`.

    Returns:
        Names and tensors; ``weights`` may have nothing but a backbone.
    """
    _, outside = take_prefix(weights, prefix)
    report.kept = outside
    report.dropped = [name for name in report.dropped if name not in outside]
    named = {name.removeprefix('module.'): tensor for name, tensor in weights.items()}
    whole = {f'backbone.{name}': tensor for name, tensor in state.items()}
    return whole | {name: named[name] for name in outside}


def _beginnings(state: Mapping[str, Tensor]) -> str:
    return ', '.join(shorten(sorted({name.split('.')[0] for name in state})))
