"""The libraries of OpenMMLab: which one a config is for, and the files that they ship."""

from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import get_object_from_string

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def read_config(path: str | Path) -> Config:
    """Read a config file, in any of MMEngine's forms.

    Args:
        path: Of a file, or of a config that an installed library ships, such as
            ``'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'``.

    Raises:
        FileNotFoundError: There is no such file or library, or it is a folder.
        ValueError: It cannot be read; the message says why.
    """
    path = find_config(path)
    if path.is_dir():
        raise FileNotFoundError(f'no config file {path}: this is a folder; give a file in it')
    if not path.is_file():
        raise FileNotFoundError(f'no config file {path}')
    try:
        return Config.fromfile(path)
    except Exception as error:  # configs are programs
        raise ValueError(f'{path} cannot be read: {type(error).__name__}: {error}') from error


def find_config(path: str | Path) -> Path:
    """Turn ``library::path``, as in ``_base_``, to the path of a file; others stay what they are.

    Raises:
        FileNotFoundError: The library is not installed, or ships no such file.
    """
    library, separator, name = str(path).partition('::')
    return shipped_file(library, f'configs/{name}') if separator else Path(path)


def shipped_file(library: str, name: str) -> Path:
    """A config or tool that an installed library ships.

    Args:
        library: A package, such as ``'mmdet'``.
        name: As in the library's repository, such as ``'tools/train.py'``.

    Raises:
        FileNotFoundError: It is not installed, or ships no such file.
    """
    spec = find_spec(library) if library.isidentifier() else None
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f'no {name} of {library}, which is not installed')
    package = Path(spec.origin).parent
    # Installed packages keep them in .mim, editable installs beside the package.
    for folder in (package / '.mim', package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f'{library} is installed in {package}, but without its {name}')


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
