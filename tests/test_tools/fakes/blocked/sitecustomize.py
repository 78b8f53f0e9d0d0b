"""Makes imports of what BLOCKED lists fail, as if it were not installed."""

import os
import sys

BLOCKED = os.environ['BLOCKED'].split()


class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)


sys.meta_path.insert(0, Blocker)
