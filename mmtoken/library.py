"""The library of OpenMMLab that a config is for."""

from pathlib import Path

from mmengine.config import Config
from mmengine.utils import get_object_from_string

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def read_config(path: str | Path) -> Config:
    """Read a config file, in any of MMEngine's forms.

    Raises:
        FileNotFoundError: There is no such file, or it is a folder.
        ValueError: It cannot be read; the message says why.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f'no config file {path}: this is a folder; give a file in it')
    if not Path(path).is_file():
        raise FileNotFoundError(f'no config file {path}')
    try:
        return Config.fromfile(path)
    except Exception as error:  # configs are programs
        raise ValueError(f'{path} cannot be read: {type(error).__name__}: {error}') from error


def library_of(cfg: Config) -> str:
    """One of :data:`LIBRARIES`: the ``default_scope``, or else that of the model.

    Configs in pure Python style usually have ``default_scope = None``; then it is the library of
    their model's class, or of a base class.

    Raises:
        ValueError: The config has neither.
    """
    scope = cfg.get('default_scope')
    if scope is None:
        scope = _library_of_type((cfg.get('model') or {}).get('type'))
    if scope not in LIBRARIES:
        raise ValueError(
            f'{cfg.filename or "the config"}: default_scope is {scope!r}; it must be one of '
            f'{", ".join(LIBRARIES)}, or None with '
            'a model whose type is a class of theirs'
        )
    return scope


def _library_of_type(given: type | str | None) -> str | None:
    """The library of a class, or of a name such as ``'mmdet.MaskRCNN'``; None if it has none."""
    if isinstance(given, str):
        library = given.partition('.')[0]
        if library in LIBRARIES:
            return library
        given = get_object_from_string(given) if '.' in given else None
    if not isinstance(given, type):
        return None
    packages = (base.__module__.partition('.')[0] for base in given.__mro__)
    return next((package for package in packages if package in LIBRARIES), None)
