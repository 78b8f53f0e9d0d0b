import sys
from pathlib import Path

import pytest
import torch
from metafiles import cache_metafiles

from mmtoken.runtime.aux_losses import AuxLossCollector

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / 'tools' / folder) for folder in ('', 'datasets', 'analysis', 'docs', 'misc')
]
sys.path.append(str(ROOT / 'benchmarks' / 'study'))
cache_metafiles()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def published_names(monkeypatch):
    """Names of the losses that networks publish, one for each time."""
    names = []
    add = AuxLossCollector.add

    def note_and_add(collector, name, value):
        names.append(name)
        add(collector, name, value)

    monkeypatch.setattr(AuxLossCollector, 'add', note_and_add)
    return names


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory):
    """A small embedded data set, in both layouts."""
    from shapes import make_dataset

    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_dataset(root, num_train=8, num_val=4)
    return root


def pytest_collection_modifyitems(items):
    """End-to-end tests first: they are long and in few files, and nothing may wait for them."""
    items.sort(key=lambda item: item.get_closest_marker('e2e') is None)
