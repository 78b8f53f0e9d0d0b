"""Describe this installation, for a bug report."""

import argparse
import sys
from collections.abc import Iterator

import mmtoken
from mmtoken.stack import installed_version, known_problems, library_versions

DESCRIPTION = """\
Print versions, devices, what mmtoken registers and problems that are known of this combination of
packages. Paste all of it into a bug report; paths and host names are not in it.

Where mmtoken refuses to be imported, set MMTOKEN_SKIP_STACK_CHECK=1.
"""
# Of MMEngine's report: several lines long, or of no use.
LEFT_OUT = ('PyTorch compiling details', 'numpy_random_seed', 'MUSA available')
DISTRIBUTIONS = (
    'torch',
    'torchvision',
    'timm',
    'numpy',
    'safetensors',
    'transformers',
    'pycocotools',
    'opencv-python',
    'opencv-python-headless',
)


def main() -> int:
    """Print the report; return 0, or 1 if there are known problems."""
    argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    problems = known_problems()
    for title, lines in (
        ('Versions', versions()),
        ('Machine', machine()),
        ('Registered', registered()),
        ('Known problems', problems or ['none']),
    ):
        print(title)
        for line in lines:
            print(f'  {line}')
    return 1 if problems else 0


def versions() -> Iterator[str]:
    """mmtoken, OpenMMLab's libraries and what they stand on."""
    yield f'mmtoken: {mmtoken.__version__}'
    for name, version in library_versions().items():
        yield f'{name}: {version}'
    for name in DISTRIBUTIONS:
        yield f'{name}: {installed_version(name) or "not installed"}'


def machine() -> Iterator[str]:
    """What MMEngine's own report says of Python, compilers, torch and GPUs."""
    try:
        from mmengine.utils.dl_utils import collect_env
    except ImportError as error:
        yield f'MMEngine: {error}'
        return
    for name, value in collect_env().items():
        if name not in LEFT_OUT:
            yield f'{name}: {value}'


def registered() -> Iterator[str]:
    """Types for configs, by registry."""
    try:
        from mmtoken.registry import ALL

        for known in ALL:
            known.import_from_location()
            yield f'{known.name}: {", ".join(sorted(known.module_dict))}'
    except ImportError as error:
        yield f'cannot be imported: {error}'


if __name__ == '__main__':
    sys.exit(main())
