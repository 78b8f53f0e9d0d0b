"""Fill in the tables of the pages from committed measurements, or check that they are fresh."""

import argparse
import re
import sys
from pathlib import Path

from generated.choice import choice
from generated.common import ROOT
from generated.cost import compiled, macs, memory, parts, profiles, speed
from generated.machines import machines
from generated.networks import models, networks, published
from generated.scores import scores
from generated.study import batches, budgets, gates, means, seeds, study, zoo

DESCRIPTION = """\
Write the generated tables of README.md, docs/, benchmarks/ and configs/*/README.md. A table stands
between two comments, the first of which names it and the files it shows:

  <!-- table: speed msvit* -->
  <!-- end -->

  choice            the methods, for the README
  machines          the same speed-ups on other machines, benchmarks/{machines,reported}
  speed [GLOB]      benchmarks/GLOB.json, of tools/analysis/benchmark.py
  profiles          benchmarks/profiles, of tools/analysis/benchmark.py --profile
  parts             benchmarks/parts, of the same for models
  compiled          benchmarks/compiled, of the same with and without --compile
  macs [GLOB]       benchmarks/macs/GLOB.json, of tools/analysis/flops.py
  memory [GLOB]     benchmarks/high_resolution/GLOB.json, of tools/analysis/flops.py --memory
  scores [GLOB]     benchmarks/shapes/GLOB.json, of tools/analysis/compare.py
  models            what every backbone of mmtoken.list_models() returns
  networks FOLDER   parameters and MACs in configs/FOLDER/metafile.yml
  published         results that authors published, in all metafiles
  study TASK        benchmarks/study/results/TASK, of benchmarks/study/run.py and measure.py
  means TASK        the same, means over trainings of the rows that have a title
  seeds TASK        the same, seed by seed
  batches TASK      the same, cost.json and cost_batchN.json: speed-ups in batches
  gates TASK        benchmarks/study/results/TASK/gates.json, of benchmarks/study/gates.py
  budgets TASK/ROW  benchmarks/study/results/TASK/budgets_ROW.json, of benchmarks/study/budgets.py
  zoo               what we have trained ourselves, config by config
"""
TABLES = dict(
    choice=choice, machines=machines, speed=speed, profiles=profiles, parts=parts,
    compiled=compiled, macs=macs, memory=memory, scores=scores, models=models, networks=networks,
    published=published, study=study, means=means, seeds=seeds, batches=batches, gates=gates,
    budgets=budgets, zoo=zoo,
)  # fmt: skip
MARK = re.compile(r'(<!-- table: (?P<name>\S+) ?(?P<argument>\S*) -->\n).*?(<!-- end -->)', re.S)


def main() -> int:
    """Write or check all pages; return 0, or 1 if --check found an old table."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='name pages that are old, write none')
    check = parser.parse_args().check
    old = [page for page in pages() if fill(page.read_text()) != page.read_text()]
    for page in old:
        print(
            f'{page.relative_to(ROOT)}: {"old; run tools/docs/tables.py" if check else "written"}'
        )
        if not check:
            page.write_text(fill(page.read_text()))
    return 1 if check and old else 0


def pages() -> list[Path]:
    """All pages that may hold tables."""
    globs = ('README.md', 'docs/*.md', 'benchmarks/**/README.md', 'configs/*/README.md')
    return [page for glob in globs for page in sorted(ROOT.glob(glob))]


def fill(text: str) -> str:
    """A page with its tables generated again.

    Raises:
        KeyError: A table has a name that is not in TABLES.
    """
    return MARK.sub(lambda m: m[1] + TABLES[m['name']](*filter(None, [m['argument']])) + m[4], text)


if __name__ == '__main__':
    sys.exit(main())
