"""Reading measurements, and writing them as tables."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BENCHMARKS = ROOT / 'benchmarks'
SIZES = ('t', 's', 'm', 'b', 'base32')  # in this order


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; columns after the first that hold figures or nothing are aligned to the right."""
    header, rows = list(header), [list(row) for row in rows]
    if not rows:
        raise ValueError(f'no rows for the table of {header}')
    figures = [
        all(re.match(r'[\d−+.][^×]*$|–?$', row[i]) for row in rows) for i in range(len(header))
    ]
    rule = ['---:' if right and i else '---' for i, right in enumerate(figures)]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in (header, rule, *rows))


def plus_minus(values: dict, decimals: int = 2, sign: bool = False) -> str:
    """A mean, with a plus sign if ``sign``, and its standard deviation if there is one."""
    mean = signed(values['mean'], decimals) if sign else f'{values["mean"]:.{decimals}f}'
    return mean if values['std'] is None else f'{mean} ± {values["std"]:.{decimals}f}'


def signed(value: float, decimals: int = 2) -> str:
    """A difference, with a minus sign proper, and none before a zero."""
    return f'{round(value, decimals) + 0.0:+.{decimals}f}'.replace('-', '−')


def read(folder: Path, glob: str) -> dict[str, dict]:
    """JSON files by name.

    Raises:
        ValueError: There are none.
    """
    files = sorted(folder.glob(f'{glob}.json'), key=lambda path: size_key(path.stem))
    if not files:
        raise ValueError(f'no {folder.relative_to(ROOT)}/{glob}.json')
    return {path.stem: json.loads(path.read_text()) for path in files}


def size_key(name: str) -> tuple[str, int, str]:
    """Order networks by name, and the sizes of one network from small to large."""
    *rest, size = name.split('_')[0].split('-')
    return ('-'.join(rest), SIZES.index(size), name) if size in SIZES else (name, 0, name)


def metafile(folder: str) -> dict:
    """What a folder of configs lists."""
    return yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())
