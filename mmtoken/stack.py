"""What of OpenMMLab is installed, and whether it can work together.

Two families of distributions provide the same import names: upstream (``mmdet``,
``mmsegmentation``, ...) and its maintained continuation (``onedl-mmdetection``, ...). The known
dead combinations fail far from their cause, with messages that do not name it; here they fail at
``import mmtoken``, with the command that mends them. Neither torch nor mmcv is imported for that.
"""

import functools
import os
import warnings
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .clashes import CLASHES, DISTRIBUTIONS, MMCV_BELOW, NEED_OPS

SKIP_CHECK = 'MMTOKEN_SKIP_STACK_CHECK'

AnyVersion = str | Version | tuple[int | str, ...] | None  # None: not installed
VersionOf = Callable[[str], AnyVersion]


def installed_version(distribution: str) -> str | None:
    """A distribution's version as it calls it, ``None`` where it is not installed."""
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, KeyError):  # the latter where remains have no version
        return None


def check_stack() -> None:
    """Refuse combinations of packages that are known not to work.

    Set ``MMTOKEN_SKIP_STACK_CHECK=1`` to go on regardless (for a patched installation).

    Raises:
        ImportError: With every problem found, what is installed, and the command that mends it.
    """
    if os.environ.get(SKIP_CHECK, '0') not in ('', '0'):
        return
    version_of = functools.cache(installed_version)
    problems = find_problems(version_of)
    problems += find_missing_ops(version_of)
    if problems:
        lines = '\n'.join(f'  - {problem}' for problem in problems)
        raise ImportError(
            f'mmtoken found OpenMMLab packages that do not work together:\n{lines}\n'
            f'To go on regardless, set {SKIP_CHECK}=1.'
        )


def find_problems(version_of: VersionOf) -> list[str]:
    """Describe each known-dead combination, with the command that mends it.

    Args:
        version_of: Maps a distribution's name to its version, ``None`` if absent.
    """
    upstream, onedl = map(' '.join, zip(*DISTRIBUTIONS.values(), strict=True))
    commands = dict(install_mmcv=_install_mmcv(version_of), upstream=upstream, onedl=onedl)
    problems = []
    for found, why, mend in CLASHES:
        versions = {name: version_of(name) for name in found}
        if all(_is_among(versions[name], among) for name, among in found.items()):
            names = (f'{name} {_text(version)}' for name, version in versions.items())
            problems.append(f'{why.format(*names)}: {mend.format(**commands)}')
    return problems


def find_missing_ops(version_of: VersionOf) -> list[str]:
    """Describe an mmcv that was built without its ops for this Python, if a library imports them.

    Args:
        version_of: Maps a distribution's name to its version, ``None`` if absent.
    """
    libraries = [name for name in NEED_OPS if version_of(name) is not None]
    mmcv = next((n for n in DISTRIBUTIONS['mmcv'] if version_of(n) is not None), None)
    if not libraries or mmcv is None:
        return []
    spec = find_spec('mmcv')
    folders = [] if spec is None else spec.submodule_search_locations or []
    if any((Path(f) / f'_ext{suffix}').exists() for f in folders for suffix in EXTENSION_SUFFIXES):
        return []
    return [
        f'{libraries[0]} imports ops of mmcv, but {mmcv} {_text(version_of(mmcv))} in '
        f'{", ".join(folders) or "no folder"} has none compiled for this Python: '
        f'{_install_mmcv(version_of)}'
    ]


def enable_config_paths() -> None:
    """Let ``mmtoken::`` and, on the onedl stack, ``mmseg::`` resolve in config files.

    MMEngine maps import names to distributions in a table that knows neither this package nor
    ``onedl-mmsegmentation``. A name there that no distribution has, it takes for a module's, and
    the folder of that is right for every kind of installation, while upstream's MMEngine does not
    find the one of an editable distribution. Without MMEngine there is nothing to enable.
    """
    try:
        from mmengine.config.utils import MODULE2PACKAGE
    except ModuleNotFoundError as error:
        if error.name != 'mmengine':
            raise
        return
    MODULE2PACKAGE['mmtoken'] = __name__
    upstream, onedl = DISTRIBUTIONS['mmseg']
    if installed_version(onedl) and not installed_version(upstream):
        MODULE2PACKAGE['mmseg'] = 'mmseg'
    configs = Path(__file__).parent / '.mim' / 'configs'
    if not configs.is_dir():
        warnings.warn(
            f'no `mmtoken::` config path will resolve, for {configs} is no folder: git made no '
            'symbolic link there. Setting up puts the configs in its place; in the checkout: '
            'pip install --no-build-isolation -e .',
            stacklevel=2,
        )


def _install_mmcv(version_of: VersionOf) -> str:
    """The command that compiles, with its ops, the mmcv which suits the installed libraries.

    Where its build does not see torch, pip makes a wheel without ops in silence, and caches that.
    """
    libraries = [
        *(DISTRIBUTIONS[module][family] for family in (1, 0) for module in ('mmdet', 'mmseg')),
        *reversed(DISTRIBUTIONS['mmpretrain']),
        'onedl-mmengine',
    ]
    first = next((name for name in libraries if version_of(name) is not None), 'mmcv')
    if first.startswith('onedl-'):
        name = requirement = 'onedl-mmcv'
    else:
        limits = [limit for n, among, limit in MMCV_BELOW if _is_among(version_of(n), among)]
        name, requirement = 'mmcv', 'mmcv==2.0.1' if '2.1' in limits else 'mmcv==2.1.0'
    return (
        'pip uninstall -y mmcv mmcv-lite mmcv-full onedl-mmcv && pip install '
        f'--no-build-isolation --no-cache-dir --no-binary {name} "{requirement}"'
    )


def _is_among(version: AnyVersion, among: str | None) -> bool:
    """Whether a version is one of those that a :class:`mmtoken.clashes.Clash` has found."""
    if version is None or among is None:
        return version is among
    if among == '':
        return True
    try:
        return SpecifierSet(among).contains(Version(_text(version)), prereleases=True)
    except InvalidVersion:  # which cannot be compared, so nothing is known against it
        return False


def _text(version: AnyVersion) -> str:
    return '.'.join(map(str, version)) if isinstance(version, tuple) else str(version)
