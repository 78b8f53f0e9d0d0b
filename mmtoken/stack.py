"""What of OpenMMLab is installed, and whether it can work together.

Two families of distributions provide the same import names: upstream (``mmdet``,
``mmsegmentation``, ...) and its maintained continuation (``onedl-mmdetection``, ...). The known
dead combinations fail far from their cause, with messages that do not name it; here they fail at
``import mmtoken``, with the command that mends them.
"""

import os
from collections.abc import Callable
from importlib import metadata

# import name -> (upstream distribution, onedl distribution)
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}
SKIP_CHECK = 'MMTOKEN_SKIP_STACK_CHECK'


def installed_version(distribution: str) -> tuple[int, ...] | None:
    """The leading numbers of a distribution's version, ``None`` where it is not installed."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in version.split('.'):
        digits = ''.join(c for c in part if c.isdigit())
        if digits != part or not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_stack() -> None:
    """Refuse combinations of packages that are known not to work.

    Set ``MMTOKEN_SKIP_STACK_CHECK=1`` to go on regardless (for a patched installation).

    Raises:
        ImportError: With every problem found, what is installed, and the command that mends it.
    """
    if os.environ.get(SKIP_CHECK, '0') not in ('', '0'):
        return
    problems = find_problems(installed_version)
    if problems:
        lines = '\n'.join(f'  - {problem}' for problem in problems)
        raise ImportError(
            f'mmtoken found OpenMMLab packages that do not work together:\n{lines}\n'
            f'To go on regardless, set {SKIP_CHECK}=1.'
        )


def find_problems(version_of: Callable[[str], tuple[int, ...] | None]) -> list[str]:
    """Describe each known-dead combination.

    Args:
        version_of: Maps a distribution name to its version tuple, or ``None`` if absent.
    """
    problems = []
    for module, (upstream, onedl) in DISTRIBUTIONS.items():
        if version_of(upstream) and version_of(onedl):
            problems.append(
                f'both {upstream} and {onedl} are installed, and each overwrites the files of '
                f'`{module}`; keep one: pip uninstall -y {upstream} {onedl} && pip install {onedl}'
            )

    mmcv = version_of('mmcv')
    for library in ('mmdet', 'mmsegmentation'):
        if mmcv and mmcv >= (2, 2) and version_of(library):
            problems.append(
                f'{library} {_dotted(version_of(library))} refuses mmcv {_dotted(mmcv)} '
                '(it allows 2.0.0rc4 to 2.1.x): pip install "mmcv==2.1.0"'
            )

    mmengine, setuptools = version_of('mmengine'), version_of('setuptools')
    if mmengine and mmengine <= (0, 10, 7) and setuptools and setuptools >= (82,):
        problems.append(
            f'mmengine {_dotted(mmengine)} needs pkg_resources, which setuptools '
            f'{_dotted(setuptools)} no longer has, so no `mmdet::` config path resolves: '
            'pip install "setuptools<82"'
        )

    torch, numpy = version_of('torch'), version_of('numpy')
    if torch and torch < (2, 3) and numpy and numpy >= (2,):
        problems.append(
            f'torch {_dotted(torch)} was built for numpy 1 and cannot exchange arrays with numpy '
            f'{_dotted(numpy)}: pip install "numpy<2"'
        )
    return problems


def enable_config_paths() -> None:
    """Let ``mmtoken::`` and, on the onedl stack, ``mmseg::`` resolve in config files.

    MMEngine maps import names to distributions in a table that knows neither this package nor
    ``onedl-mmsegmentation``. Without MMEngine there is nothing to enable.
    """
    try:
        from mmengine.config.utils import MODULE2PACKAGE
    except ModuleNotFoundError as error:
        if error.name != 'mmengine':
            raise
        return
    MODULE2PACKAGE['mmtoken'] = 'mmtoken'
    upstream, onedl = DISTRIBUTIONS['mmseg']
    if installed_version(onedl) and not installed_version(upstream):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _dotted(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version))
