"""Which packages of OpenMMLab are installed, and whether they work together.

Two families of distributions provide the same import names: upstream (``mmdet``,
``mmsegmentation``, ...) and its maintained continuation (``onedl-mmdetection``, ...). Combinations
that do not work fail late, with messages that do not name the cause. Here they fail at
``import mmtoken``, with the command that solves the problem. Neither torch nor mmcv is imported.
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
from packaging.version import InvalidVersion

from .clashes import CLASHES, DISTRIBUTIONS, MMCV_BELOW, NEED_OPS

SKIP_CHECK = 'MMTOKEN_SKIP_STACK_CHECK'

VersionOf = Callable[[str], str | None]  # of a distribution; None: not installed


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, KeyError):  # the latter after an incomplete removal
        return None


def library_versions() -> dict[str, str]:
    """``{'mmdet': 'onedl-mmdetection 3.5.1'}`` and so on, for installed libraries of OpenMMLab."""
    versions = {}
    for module, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            if version := installed_version(distribution):
                versions[module] = f'{distribution} {version}'
    return versions


def check_stack() -> None:
    """Refuse combinations of packages that are known not to work.

    ``MMTOKEN_SKIP_STACK_CHECK=1`` in the environment skips this, for patched installations.

    Raises:
        ImportError: Lists every problem, with the versions and the command that solves it.
    """
    if os.environ.get(SKIP_CHECK, '0') not in ('', '0'):
        return
    if problems := known_problems():
        lines = '\n'.join(f'  - {problem}' for problem in problems)
        raise ImportError(
            f'mmtoken found OpenMMLab packages that do not work together:\n{lines}\n'
            f'To skip this check, set {SKIP_CHECK}=1, as in: {SKIP_CHECK}=1 python -m mmtoken env'
        )


def known_problems() -> list[str]:
    """Describe what is known not to work of all that is installed."""
    version_of = functools.cache(installed_version)
    return find_problems(version_of) + find_missing_ops(version_of) + find_missing_opencv()


def find_problems(version_of: VersionOf) -> list[str]:
    """Describe each combination that does not work, with the command that solves it.

    Args:
        version_of: Maps a distribution's name to its version, None if absent.
    """
    upstream, onedl = map(' '.join, zip(*DISTRIBUTIONS.values(), strict=True))
    commands = dict(install_mmcv=_install_mmcv(version_of), upstream=upstream, onedl=onedl)
    problems = []
    for found, why, command in CLASHES:
        versions = {name: version_of(name) for name in found}
        if all(_is_among(versions[name], among) for name, among in found.items()):
            names = (f'{name} {version}' for name, version in versions.items())
            problems.append(f'{why.format(*names)}: {command.format(**commands)}')
    return problems


def find_missing_ops(version_of: VersionOf) -> list[str]:
    """Describe an mmcv without ops compiled for this Python, if a library imports them.

    Args:
        version_of: Maps a distribution's name to its version, None if absent.
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
        f'{libraries[0]} imports ops of mmcv, but {mmcv} {version_of(mmcv)} in '
        f'{", ".join(folders) or "no folder"} has none compiled for this Python: '
        f'{_install_mmcv(version_of)}'
    ]


def find_missing_opencv() -> list[str]:
    """Describe an MMEngine without OpenCV, which it imports; onedl-mmengine does not install it."""
    if find_spec('mmengine') is None or find_spec('cv2') is not None:
        return []
    return ['MMEngine imports cv2, which is not installed: pip install opencv-python-headless']


def enable_config_paths() -> None:
    """Let ``mmtoken::`` and, on the onedl stack, ``mmseg::`` resolve in config files.

    MMEngine maps import names to distributions in a table that has neither this package nor
    ``onedl-mmsegmentation`` (November 2026: mmengine 0.10.7, onedl-mmengine 0.10.12). Where an
    entry is no distribution, MMEngine uses the folder of the module of that name, which is right
    for every kind of installation; mmengine 0.10.7 does not find an editable distribution. Without
    MMEngine nothing is done.
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
            f'no `mmtoken::` config path will resolve: {configs} is no folder, because git made '
            'no symbolic link. To repair it, run in the checkout: '
            'pip install --no-build-isolation -e .',
            stacklevel=2,
        )


def _install_mmcv(version_of: VersionOf) -> str:
    """The command that compiles the mmcv that suits the installed libraries, with its ops.

    With build isolation, the build does not see torch and silently gives a wheel without ops, which
    pip caches (mmcv 2.1.0, onedl-mmcv 2.3.6).
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


def _is_among(version: str | None, among: str | None) -> bool:
    """Whether a version is one of those in ``found`` of a :class:`mmtoken.clashes.Clash`."""
    if version is None or not among:
        return (version is None) == (among is None)
    try:
        return SpecifierSet(among).contains(version, prereleases=True)
    except InvalidVersion:  # cannot be compared, so no problem is known
        return False
