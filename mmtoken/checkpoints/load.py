"""Load a checkpoint file into a backbone, and refuse what does not fit.

MMEngine's ``Pretrained`` initialisation goes on with a warning when no key of a file matches, so
that a wrong file trains from scratch in silence. Here every name must find its place, but for those
that the model or the file's source declares to be expendable.
"""

import os
import re
from collections.abc import Iterable, Mapping

import torch.nn as nn
from mmengine.logging import print_log
from torch import Tensor

from .convert import check_source, detect_source, rename, take_prefix
from .fit import adopt_grids, fit
from .reader import find_weights, read_checkpoint
from .report import Report
from .sources import SOURCES
from .sources.source import matches

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
    and ``'module.'`` in front of names is dropped. Foreign names are recognised and made ours, and
    shapes brought to the module's, see :func:`~mmtoken.checkpoints.convert` and
    :func:`~mmtoken.checkpoints.fit.fit`; positions are laid out as in the file. The module may
    declare two regular expressions: ``ignorable_keys``, names a file may have in excess, and
    ``newly_initialized_keys``, names it may lack.

    Args:
        module: Where the weights go.
        file: Path or URL.
        prefix: What precedes the module's names in the file; everything else in the file is left
            out. By default ``'backbone.'``, or the module's ``usual_prefix``, if any name starts
            with it, otherwise nothing.
        source: Family of the file, as for :func:`~mmtoken.checkpoints.convert`; recognised by the
            names if not given.

    Returns:
        What became of the names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged or holds no weights, or weights of something else: names or
            shapes that differ are listed. The module is then as it was.
    """
    if source is not None:
        check_source(source)
    weights = find_weights(read_checkpoint(file), file)
    state, report = fit_to(module, weights, file, prefix, source)
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
    unused = [getattr(module, 'unused_keys', None), getattr(module, 'unbuilt_keys', None)]
    fresh = [getattr(module, 'fresh_keys', None)]
    if source is None and not _are_own(state, own, unused, fresh):
        source = detect_source(state, prefix='')
    if source is None:
        report = Report(mapped={name: name for name in state})
    else:
        as_in_file = state
        state, report = rename(state, source)
        if SOURCES[source].check:
            SOURCES[source].check(as_in_file, module)
        unused.append(SOURCES[source].unused)
        groups = SOURCES[source].fresh
        fresh += [g for g in groups if not any(matches(g, name) for name in state)]
    state = fit(state, module, report)
    fresh += map(re.escape, report.fresh)  # what fit has left to the model

    for name in [n for n in state if n not in own and _match_any(unused, n)]:
        del state[name]
        report.dropped.append(report.mapped.pop(name))
    report.fresh = [name for name in own if name not in state]
    _check(module, own, state, fresh, report)
    report.unknown = []  # they all were in the module, or expendable
    report.dropped += outside
    return state, report


def _are_own(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    unused: list[str | None],
    fresh: list[str | None],
) -> bool:
    """Whether the names need no conversion."""
    return all(name in own or _match_any(unused, name) for name in state) and all(
        name in state or _match_any(fresh, name) for name in own
    )


def _check(
    module: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    fresh: list[str | None],
    report: Report,
) -> None:
    unexpected = [report.mapped[name] for name in state if name not in own]
    missing = [name for name in report.fresh if not _match_any(fresh, name)]
    reshaped = [
        f'{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}'
        for name in own
        if name in state and name not in report.grids and state[name].shape != own[name].shape
    ]
    if not (unexpected or missing or reshaped):
        return
    origin = f'it was read as {report.origin}'
    if report.source is None:
        origin = f'its names are of no known source ({", ".join(SOURCES)}){_look_alike(unexpected)}'
    shared = sum(name in state for name in own)
    raise ValueError(
        f'does not fit {type(module).__name__}; {origin} and has {shared} of its {len(own)} tensors'
        f'{_list("names it should not have", unexpected)}'
        f'{_list("names it lacks", missing)}'
        f'{_list("other shapes", reshaped)}{_advise(reshaped, state, own)}'
    )


def _look_alike(names: list[str]) -> str:
    """The library whose names these are, where the same weights exist under known ones."""
    for library, pattern in LOOK_ALIKES.items():
        if any(re.match(pattern, name) for name in names):
            return f", but look like {library}'s; take the file of timm or of the authors instead"
    return ''


def _advise(reshaped: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The argument that other shapes call for, where one does."""
    if len(reshaped) == 1 and reshaped[0].partition(' ')[0].endswith('pos_embed'):
        return '; its grid is no square: set img_size to (H, W) of the images it was trained on'
    if reshaped and all(
        own[name].ndim == 4 and state[name].shape[1] != own[name].shape[1]
        for name in (item.partition(' ')[0] for item in reshaped)
    ):
        return '; set in_channels to that of the file'
    return ''


def _match_any(patterns: Iterable[str | None], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _list(what: str, items: list[str], limit: int = 8) -> str:
    if not items:
        return ''
    more = f', and {len(items) - limit} more' if len(items) > limit else ''
    return f'; {what}: {", ".join(items[:limit])}{more}'
