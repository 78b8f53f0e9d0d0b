"""Files as other projects save them."""

import argparse
import contextlib
import csv
import re
import sys
import types
import zipfile
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[1] / 'data'
TABLE = DATA / 'stvit_r_keys.tsv'


@pytest.fixture(params=[{}, dict(_use_new_zipfile_serialization=False)], ids=['zip', 'legacy'])
def kind(request):
    return request.param


@pytest.fixture
def save(tmp_path):
    """Saves what it is given, and returns the path."""

    def save_to(content, name='file.pth', **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return str(tmp_path / name)

    return save_to


@pytest.fixture
def save_pickle(tmp_path):
    """Saves a file of torch whose pickle is the bytes that it is given."""

    def save_to(pickled, name='file.pth'):
        torch.save(dict(weight=torch.arange(4.0)), tmp_path / 'model.pth')
        with zipfile.ZipFile(tmp_path / 'model.pth') as old:
            records = {record: old.read(record) for record in old.namelist()}
        with zipfile.ZipFile(tmp_path / name, 'w') as new:
            for record, content in records.items():
                new.writestr(record, pickled if record.endswith('/data.pkl') else content)
        return str(tmp_path / name)

    return save_to


@contextlib.contextmanager
def passing_modules(**classes):
    """Modules that are gone when the file is read; names have ``__`` for dots."""
    made = []
    for path, cls in classes.items():
        *parts, name = path.split('__')
        for i in range(len(parts)):
            module = '.'.join(parts[: i + 1])
            if module not in sys.modules:
                sys.modules[module] = types.ModuleType(module)
                made.append(module)
        cls.__module__, cls.__name__, cls.__qualname__ = '.'.join(parts), name, name
        setattr(sys.modules['.'.join(parts)], name, cls)
    try:
        yield
    finally:
        for module in made:
            del sys.modules[module]


@pytest.fixture
def training_leftovers():
    """What training scripts put beside the weights; saved inside ``with``, unknown afterwards."""

    @contextlib.contextmanager
    def make():
        class CfgNode(dict):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.__dict__['__immutable__'] = True

        class HistoryBuffer:
            def __init__(self):
                self._log_history = np.array([1.0, 2.0])
                self._statistics = defaultdict(list, mean=[np.float64(3)])
                self._window = deque([1, 2])

        with passing_modules(
            oldconf__config__CfgNode=CfgNode, oldlogs__buffers__HistoryBuffer=HistoryBuffer
        ):
            yield dict(
                args=argparse.Namespace(lr=0.1, out=Path('out')),
                config=CfgNode(MODEL=CfgNode(DEPTHS=[2, 2])),
                message_hub=dict(log_scalars={'train/loss': HistoryBuffer()}),
                optimizer=dict(state={0: dict(step=1, exp_avg=torch.zeros(3))}),
                rng=np.random.RandomState(0).get_state(),
                seen={1, 2},
                dtype=torch.float16,
                epoch=12,
            )

    return make


def official_weights(size, task):
    """Synthetic weights with the names and shapes of a released STViT-R.

    Each is one number, repeated, which keeps the files small.
    """
    weights = {}
    for i, row in enumerate(csv.DictReader(TABLE.open(), delimiter='\t')):
        if row['file'] in ('both', task):
            shape = [int(n) for n in row[size].split('x')] if row[size] != '-' else []
            integer = row['name'].endswith(('num_batches_tracked', 'relative_position_index'))
            value = torch.tensor(i, dtype=torch.int64 if integer else torch.float32)
            weights[row['name']] = value.expand(shape)
    return weights


def dge_weights(model):
    """As :func:`official_weights`, of a model in the table of DGE."""
    weights = {}
    for row in csv.DictReader((DATA / 'dge_keys.txt').open(), delimiter='\t'):
        if row['model'] == model:
            start, *rest = re.split(r'\[0-(\d+)\]', row['name'])
            names = [f'{start}{i}{rest[1]}' for i in range(int(rest[0]) + 1)] if rest else [start]
            for name in names:
                value = torch.tensor(float(len(weights)))
                weights[name] = value.expand([int(n) for n in row['shape'].split('x')])
                if name.endswith('.splits'):
                    weights[name] = torch.tensor([4, 2, 1])
    return weights


@pytest.fixture
def official_checkpoint(training_leftovers, save):
    """A released file: of a classifier (``'cls'``) or of a detector (``'det'``)."""

    def make(size, task):
        weights = official_weights(size, task)
        with training_leftovers() as leftovers:
            if task == 'cls':
                return save(dict(leftovers, model=weights))
            weights = {f'backbone.{name}': tensor for name, tensor in weights.items()}
            weights['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
            for i in range(3):
                weights[f'roi_head.bbox_head.{i}.fc_cls.weight'] = torch.zeros(1)
            return save(dict(leftovers, meta=dict(config='...'), state_dict=weights))

    return make


@pytest.fixture
def wake():
    """Lets every parameter and statistic of a model matter."""

    def randomise(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.3, 0.5)
        model.eval()  # which returns nothing in OpenMMLab's
        return model

    return randomise
