"""Load a checkpoint file into a backbone, and refuse what does not fit.

MMEngine's ``Pretrained`` initialisation goes on with a warning when no key of a file matches, so
that a wrong file trains from scratch in silence. Here every key must find its place, but for those
that a module declares to be expendable.
"""

import os
import re
from collections.abc import Mapping

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

WRAPPERS = ('state_dict', 'model')


def load_into(module: nn.Module, file: str | os.PathLike, prefix: str | None = None) -> None:
    """Load ``file`` into ``module``.

    A training checkpoint is unwrapped (``'state_dict'``, ``'model'``), and ``'module.'`` in front
    of names is dropped. The module may declare two regular expressions: ``unused_keys``, names a
    file may have in excess, and ``fresh_keys``, names it may lack.

    Args:
        module: Where the weights go.
        file: Path or URL.
        prefix: What precedes the module's names in the file; everything else in the file is left
            out. By default ``'backbone.'`` if any name starts with it, otherwise nothing.

    Raises:
        ValueError: The file holds no weights, or weights of something else: names or shapes that
            differ are listed.
    """
    file = os.fspath(file)
    checkpoint = CheckpointLoader.load_checkpoint(file, 'cpu')
    state = strip_prefix(find_weights(checkpoint, file), prefix)
    own = module.state_dict()
    unused = getattr(module, 'unused_keys', None)
    fresh = getattr(module, 'fresh_keys', None)

    state = {k: v for k, v in state.items() if k in own or not _matches(unused, k)}
    unexpected = [k for k in state if k not in own]
    missing = [k for k in own if k not in state and not _matches(fresh, k)]
    reshaped = [
        f'{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if unexpected or missing or reshaped:
        raise ValueError(
            f'{file} does not fit {type(module).__name__}'
            f'{_list("names it should not have", unexpected)}'
            f'{_list("names it lacks", missing)}'
            f'{_list("other shapes", reshaped)}'
        )
    module.load_state_dict(state, strict=False)
    untouched = sorted(k for k in own if k not in state)
    print_log(
        f'Loaded {len(state)} tensors from {file}; '
        f'{len(untouched)} keep their initial values: {untouched}',
        logger='current',
    )


def find_weights(checkpoint: object, file: str) -> dict[str, Tensor]:
    """The state dict inside a loaded checkpoint."""
    for key in WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if isinstance(checkpoint, Mapping):
        weights = {
            k.removeprefix('module.'): v for k, v in checkpoint.items() if isinstance(v, Tensor)
        }
        if weights:
            return weights
    raise ValueError(f'{file} holds no weights: no mapping of names to tensors was found in it')


def strip_prefix(state: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """Keep what starts with ``prefix``, without it."""
    if prefix is None:
        prefix = 'backbone.' if any(k.startswith('backbone.') for k in state) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    stripped = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not stripped:
        starts = sorted({k.split('.')[0] for k in state})
        raise ValueError(f'no name starts with prefix {prefix!r}; names start with {starts}')
    return stripped


def _matches(pattern: str | None, key: str) -> bool:
    return pattern is not None and re.fullmatch(pattern, key) is not None


def _list(what: str, items: list[str], limit: int = 8) -> str:
    if not items:
        return ''
    more = f', and {len(items) - limit} more' if len(items) > limit else ''
    return f'; {what}: {", ".join(items[:limit])}{more}'
