"""Every config builds and trains, and reads as the README says.

Configs of one kind differ in size, schedule and batch alone. Their smallest takes a training step;
the others, up to 145 M parameters, are built without values, and their feature maps computed
without values, which finds widths that do not fit.
"""

import copy
import functools
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import one_iteration
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mmtoken import routing_override
from mmtoken.analysis import count_macs, dense_twin
from mmtoken.analysis.configs import default_shape
from mmtoken.analysis.twin import our_class
from mmtoken.backbones import MergeViT
from mmtoken.runtime.reference import reference_path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p for p in ROOT.glob('configs/*/*.py') if p.parent.name != '_base_')
SIZES = ('', 't', 'tiny', 's', 'small', 'm', 'medium', 'b', 'base', 'base32')
SIZE = re.compile(rf'-({"|".join(SIZES[1:])})(?=-|_|$)')
RATIOS = dict(query_ratio=0.436, coarse_ratio=0.5)  # at which costs are listed


def kind(path):
    """A config's name without size, schedule and data; heads of one name are in both libraries."""
    return SIZE.sub('', re.split(r'_\d+xb\d', path.stem)[0]), '_coco' in path.stem


def size(path):
    found = SIZE.search(path.stem)
    return SIZES.index(found[1] if found else '')


SMALLEST = list({kind(path): path for path in sorted(CONFIGS, key=size, reverse=True)}.values())


def each(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda path: path.stem)


def load(path):
    return copy.deepcopy(_read(path))


@functools.cache
def _read(path):
    return Config.fromfile(path)


@each(CONFIGS)
def test_config(path):
    cfg = load(path)
    assert cfg.model.backbone.type.startswith('mmtoken.')
    assert cfg.auto_scale_lr.base_batch_size == base_batch_size(path.stem)
    assert cfg.train_dataloader.batch_size == images_per_gpu(path.stem)
    hooks = [hook.type for hook in cfg.get('custom_hooks', [])]
    assert ('mmtoken.TokenLossHook' in hooks) == is_routed(cfg.model.backbone)


def test_hooks_of_the_base_stay():
    cfg = load(ROOT / 'configs' / 'msvit' / 'rtmdet-ins_msvit-s_8xb32-300e_coco.py')
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ['EMAHook', 'PipelineSwitchHook', 'mmtoken.TokenLossHook']


def is_routed(backbone):
    """Whether regions choose their granularity, so that shapes depend on values."""
    return routing(backbone) is not None


def routing(backbone):
    """The ratio at which costs are listed, by its name; None without routers."""
    cls = our_class(backbone)
    name, value = next(iter(cls.twin_args.items()))  # the rest follows from it
    dense = backbone.get(name, 'default') == value
    return None if dense or cls.ratio_name is None else {cls.ratio_name: RATIOS[cls.ratio_name]}


def images_per_gpu(name):
    return int(batch_field(name).split('xb')[1])


def base_batch_size(name):
    gpus, images = batch_field(name).split('xb')
    return int(gpus) * int(images)


def batch_field(name):
    return next(part for part in name.replace('_', '-').split('-') if 'xb' in part)


@each(SMALLEST)
def test_dump(path, tmp_path, monkeypatch):
    # How it is laid out does not matter, and takes seconds.
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    cfg = load(path)
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@each(SMALLEST)
def test_one_iteration(path):
    parameters, loss = one_iteration.run(load(path))
    assert parameters > 1e6 and loss > 0


@each([path for path in CONFIGS if path not in SMALLEST])
def test_widths_fit(path, monkeypatch):
    # mmseg's mask transformer reads the values of its stochastic depth.
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    cfg = load(path)
    backbone = cfg.model.backbone
    if is_routed(backbone) or issubclass(our_class(backbone), MergeViT):
        cfg = dense_twin(cfg)  # whose widths are the same
    cfg.model.backbone.pop('window_size', None)  # what is in a window depends on values, too
    with torch.device('meta'):
        model = one_iteration.build(cfg).eval()
    images = torch.zeros(1, 3, one_iteration.HEIGHT, one_iteration.WIDTH, device='meta')
    with torch.no_grad():
        maps = model.extract_feat(images)
        for head in ('rpn_head', 'bbox_head', 'decode_head', 'auxiliary_head', 'head'):
            if getattr(model, head, None) is not None:
                getattr(model, head)(maps)


@each([p for p in CONFIGS if '-dense' in p.stem])
def test_twins_differ_in_the_backbone_alone(path):
    """And there in what `dense_twin` changes, and a stem and weights that suit the twin."""
    twin, sparse = load(path), load(path.with_name(path.name.replace('-dense', '')))
    assert twin.model.backbone != sparse.model.backbone
    sparse = dense_twin(sparse)
    for cfg in (twin, sparse):
        cfg.pop('checkpoint', None)
        for argument in ('stem', 'init_cfg'):
            cfg.model.backbone.pop(argument, None)
    assert twin.to_dict() == sparse.to_dict()


def test_user_config_inherits_ours(tmp_path):
    """As the README shows it, in a process that has not imported mmtoken."""
    (tmp_path / 'mine.py').write_text(
        "_base_ = __import__('mmtoken') and "
        "'mmtoken::stvit_r/mask-rcnn_stvit-r-swin-t_fpn_8xb2-1x_coco.py'\n"
        'model = dict(backbone=dict(drop_path_rate=0.1))\n'
    )
    code = (
        'import json, sys; from mmengine.config import Config; '
        "b = Config.fromfile('mine.py').model.backbone; print(json.dumps(b.to_dict()))"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    backbone = json.loads(out.stdout.splitlines()[-1])
    assert backbone == dict(type='mmtoken.STViTRSwin', arch='tiny', drop_path_rate=0.1)


def listed_models():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    metafiles = [yaml.safe_load((ROOT / file).read_text()) for file in index['Import']]
    return [model for metafile in metafiles for model in metafile['Models']]


def test_model_index_lists_every_config():
    models = listed_models()
    assert all(set(m) >= {'Name', 'In Collection', 'Config'} for m in models)
    assert all(m['Name'] == Path(m['Config']).stem for m in models)
    assert sorted(ROOT / m['Config'] for m in models) == CONFIGS


def test_listed_costs_are_counted():
    """Of each backbone, without arithmetic; fifty configs share a few."""
    counted = {}
    for model in listed_models():
        if 'FLOPs' not in model['Metadata']:
            continue
        cfg = load(ROOT / model['Config'])
        shape, backbone = default_shape(cfg), cfg.model.backbone.to_dict()
        for argument in ('init_cfg', 'drop_path_rate'):
            backbone.pop(argument, None)
        key = (shape, json.dumps(backbone, sort_keys=True))
        if key not in counted:
            counted[key] = count(backbone, shape)
        listed = model['Metadata']['Parameters'], model['Metadata']['FLOPs']
        assert listed == counted[key], model['Name']


def count(backbone, shape):
    """Parameters and multiply-accumulates; where regions choose, those of random choices."""
    with torch.device('meta'):
        network, images = MODELS.build(backbone).eval(), torch.zeros(1, 3, *shape)
    parameters = sum(p.numel() for p in network.parameters())
    ratio = routing(backbone)
    windowed = backbone['type'] == 'mmtoken.MSViT' and backbone.get('window_size')
    if ratio is None and not windowed:
        with reference_path():
            return parameters, count_macs(network, images)
    # Choices and windows of mixed tokens need values, though not those of the weights.
    network, images = network.to_empty(device='cpu'), torch.zeros(1, 3, *shape)
    choices = routing_override(**ratio) if ratio else nullcontext()
    with choices, reference_path(), WithoutProducts():
        return parameters, count_macs(network, images)


class WithoutProducts(TorchDispatchMode):
    """Products of matrices, convolutions and attention give zeros, at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not re.search('mm$|convolution|attention', func._schema.name):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to('meta'), (args, kwargs))
        shapes = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t, device='cpu'), shapes)
