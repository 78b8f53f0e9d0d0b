"""Load a checkpoint file into a backbone, and refuse what does not fit.

MMEngine's ``Pretrained`` only warns where no key of a file matches, and trains from random weights.
Here every name must have its place, except those that the model or the family of the file declares
optional.
"""

import os
import re
from collections.abc import Mapping

import torch.nn as nn
from mmengine.logging import print_log
from torch import Tensor

from .convert import detect_source, rename, take_prefix
from .fit import adopt_grids, fit
from .reader import find_weights, read_checkpoint
from .report import Report, shorten
from .sources import SOURCES
from .sources.source import matches_any

# Libraries that have the same models under other names, and what their names begin with
LOOK_ALIKES = {
    'torchvision': r'features\.\d|encoder\.layers\.encoder_layer_',
    'Hugging Face transformers': r'(\w+\.)?(encoder\.layers?\.\d|embeddings\.)',
}


def load_into(
    module: nn.Module,
    file: str | os.PathLike,
    prefix: str | None = None,
    source: str | None = None,
) -> Report:
    """Load ``file`` into ``module``.

    Nothing in the file is run. A training checkpoint is unwrapped (``'state_dict'``, ``'model'``),
    and ``'module.'`` in front of names is dropped. Foreign names are recognized and made ours, and
    shapes brought to the module's, see :func:`~mmtoken.checkpoints.convert` and
    :func:`~mmtoken.checkpoints.fit.fit`; positions are laid out as in the file. The module may
    declare regular expressions: ``ignorable_keys`` and ``unbuilt_keys``, names that a file may have
    in excess, and ``newly_initialized_keys``, names that it may lack.

    Args:
        module: Where the weights go.
        file: Path or URL.
        prefix: What precedes the module's names in the file; everything else in the file is left
            out. By default ``'backbone.'``, or the module's ``usual_prefix``, if any name starts
            with it, otherwise nothing.
        source: Family of the file, as for :func:`~mmtoken.checkpoints.convert`; recognized by the
            names if not given.

    Returns:
        What became of the names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged or holds no weights, or weights of something else: names or
            shapes that differ are listed, and so are values that are no numbers. The module is then
            as it was.
    """
    weights = find_weights(read_checkpoint(file), file)
    state, report = fit_to(module, weights, file, prefix, source)
    _check_values(module, state, file)
    adopt_grids(module, report.grids)
    module.load_state_dict(module.state_dict() | state)  # what the file lacks stays as it is
    print_log(f'Loaded {file}, {report.summary()}', logger='current')
    return report


def fit_to(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    file: str | os.PathLike,
    prefix: str | None = None,
    source: str | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """Names and tensors as ``module`` has them. Arguments and errors as for :func:`load_into`."""
    try:
        return _fit_to(module, weights, prefix, source)
    except ValueError as error:
        raise ValueError(f'{os.fspath(file)}: {error}') from error


def _fit_to(
    module: nn.Module, weights: Mapping[str, Tensor], prefix: str | None, source: str | None
) -> tuple[dict[str, Tensor], Report]:
    state, outside = take_prefix(weights, prefix, getattr(module, 'usual_prefix', 'backbone.'))
    own = module.state_dict()
    ignorable = _declared(module, 'ignorable_keys', 'unbuilt_keys')
    new = _declared(module, 'newly_initialized_keys')
    if source is None and (_excess(state, own, ignorable) or _excess(own, state, new)):
        source = detect_source(state, prefix='')
    if source is None:
        report = Report(mapped={name: name for name in state})
    else:
        as_in_file = state
        state, report = rename(state, source)
        family = SOURCES[source]
        if family.check:
            family.check(as_in_file, state, module)
        ignorable += [family.ignorable_keys] if family.ignorable_keys else []
        new += [group for group in family.newly_initialized_keys if not matches_any(group, state)]
    state = fit(state, module, report)
    new += map(re.escape, report.newly_initialized)  # by fit

    unexpected = _excess(state, own, ignorable)
    for name in [n for n in state if n not in own and n not in unexpected]:
        del state[name]
        report.dropped.append(report.mapped.pop(name))
    report.newly_initialized = [name for name in own if name not in state]
    _check(module, own, state, unexpected, _excess(own, state, new), report)
    report.unknown = []  # all are in the module, or ignorable
    report.dropped += outside
    return state, report


def _check_values(module: nn.Module, state: Mapping[str, Tensor], file: str | os.PathLike) -> None:
    """Raise a ValueError that lists tensors with other values than the weights of a training."""
    real = [name for name, own in module.state_dict().items() if own.is_floating_point()]
    real = [name for name in real if name in state]
    others = [name for name in real if not state[name].is_floating_point()]
    if others:
        kinds = {str(state[name].dtype) for name in others}
        raise ValueError(
            f'{os.fspath(file)}: weights are floating point, but {len(others)} tensors are '
            f'{", ".join(sorted(kinds))}: {", ".join(shorten(others))}'
        )
    if broken := [name for name in real if not state[name].float().isfinite().all()]:
        raise ValueError(
            f'{os.fspath(file)}: NaN or infinity in {len(broken)} tensors, as of a training that '
            f'diverged: {", ".join(shorten(broken))}'
        )


def _declared(module: nn.Module, *attributes: str) -> list[str]:
    """The regular expressions in those attributes that the module has."""
    return [pattern for name in attributes if (pattern := getattr(module, name, None))]


def _excess(names: Mapping, others: Mapping, optional: list[str]) -> list[str]:
    """Names that are not among the others, although they are not optional."""
    pattern = re.compile('|'.join(f'(?:{part})' for part in optional) or r'(?!)')
    return [name for name in names if name not in others and not pattern.fullmatch(name)]


def _check(
    module: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    unexpected: list[str],
    missing: list[str],
    report: Report,
) -> None:
    """Raise a ValueError that lists all names and shapes that do not fit, if there are any."""
    reshaped = [
        name
        for name in own
        if name in state and name not in report.grids and state[name].shape != own[name].shape
    ]
    if not (unexpected or missing or reshaped):
        return
    unexpected = [report.mapped[name] for name in unexpected]
    origin = f'it was read as {report.origin}'
    if report.source is None:
        origin = f'its names are of no known source ({", ".join(SOURCES)}){_look_alike(unexpected)}'
    shared = sum(name in state for name in own)
    shapes = [
        f'{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}'
        for name in reshaped
    ]
    lists = dict(zip(('names it should not have', 'names it lacks', 'other shapes'),
                     (unexpected, missing, shapes), strict=True))  # fmt: skip
    raise ValueError(
        f'does not fit {type(module).__name__}; {origin} and has {shared} of its {len(own)} tensors'
        + ''.join(
            f'; {what}: {", ".join(shorten(names))}' for what, names in lists.items() if names
        )
        + _advise(reshaped, state, own)
    )


def _look_alike(names: list[str]) -> str:
    """The library whose names these are, where the same weights exist under known ones."""
    for library, pattern in LOOK_ALIKES.items():
        if any(re.match(pattern, name) for name in names):
            return f", but look like {library}'s; take the file of timm or of the authors instead"
    return ''


def _advise(reshaped: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The argument to change, where one explains the shapes."""
    if len(reshaped) == 1 and reshaped[0].endswith('pos_embed'):
        return '; its grid is no square: set img_size to (H, W) of the images it was trained on'
    if reshaped and all(
        own[name].ndim == 4 and state[name].shape[1] != own[name].shape[1] for name in reshaped
    ):
        return '; set in_channels to that of the file'
    return ''
