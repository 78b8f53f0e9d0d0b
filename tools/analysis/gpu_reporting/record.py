"""The file of a report: written after every case, and gone on with."""

import json
from pathlib import Path

from mmtoken.files import replacing

from .cases import Case


class Record:
    """Results of cases by name, in a JSON file.

    Args:
        path: The file.
        setup: What must be the same for results to be in one file: machine, versions, kind of
            report. The date may differ.
        resume: Go on with an existing file.

    Raises:
        FileExistsError: There is such a file, and ``resume`` is not set.
        ValueError: It is no report, or one of another setup.
    """

    def __init__(self, path: Path, setup: dict, resume: bool = False) -> None:
        self.path, self.setup = path, setup
        self.results: dict[str, dict] = {}
        if path.exists():
            if not resume:
                raise FileExistsError(
                    f'{path} exists: give --resume to go on with it, or another name'
                )
            self.results = self._load()

    def _load(self) -> dict[str, dict]:
        try:
            old = json.loads(self.path.read_text())
            cases = old.pop('cases')
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f'{self.path} is no report of this tool') from None
        differing = [k for k in old.keys() | self.setup.keys() if old.get(k) != self.setup.get(k)]
        if differing:
            names = ', '.join(
                f'{k}: {old.get(k)}, now {self.setup.get(k)}' for k in sorted(differing)
            )
            raise ValueError(f'{self.path} was measured otherwise ({names}): give another name')
        return cases

    def missing(self, cases: list[Case]) -> list[Case]:
        """Cases without results, and those that failed."""
        return [case for case in cases if 'failed' in self.results.get(str(case), dict(failed=''))]

    def add(self, case: Case, result: dict) -> None:
        """Keep the results of a case, and write the file."""
        self.results[str(case)] = result
        with replacing(self.path) as new:
            new.write_text(json.dumps(self.setup | dict(cases=self.results), indent=2) + '\n')
