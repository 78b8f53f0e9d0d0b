"""Backbones, and what metafiles say of configs."""

import re

import torch

from mmtoken.models import find_model, list_models

from .common import ROOT, markdown, metafile, size_key

DATA = ('COCO', 'ADE20K', 'Cityscapes', 'ImageNet-1k', 'Data Science Bowl 2018')  # in this order
SHORT = dict(tiny='t', small='s', medium='m', base='b')


def models() -> str:
    """Backbones by name, with the maps that they return if nothing else is asked for."""
    rows = []
    for name in list_models():
        cls, arch = find_model(name)
        with torch.device('meta'):
            backbone = cls(arch=arch)
        info, parameters = backbone.feature_info, sum(p.numel() for p in backbone.parameters())
        rows.append(
            (f'`{name}`', f'`{cls.__name__}`', ', '.join(map(str, info.reduction())),
             ', '.join(map(str, info.channels())), str(backbone.num_stages),
             f'{parameters / 1e6:.2f}')
        )  # fmt: skip
    return markdown(('name', 'type', 'strides', 'channels', 'stages', 'M parameters'), rows)


def networks(folder: str) -> str:
    """Parameters and MACs in a metafile, a row for each network, in brackets its dense twin's.

    Where configs of one network differ (another neck, another image size) all figures are given.
    """
    figures: dict[str, dict[tuple[str, bool], set[str]]] = {}
    for model in metafile(folder)['Models']:
        metadata = model['Metadata']
        if 'FLOPs' not in metadata:
            continue
        name, twin = network_name(model['Name'])
        row = figures.setdefault(name, {})
        row.setdefault(('M parameters', twin), set()).add(f'{metadata["Parameters"] / 1e6:.2f}')
        data = f'{metadata["Training Data"]}, G MACs'
        row.setdefault((data, twin), set()).add(f'{metadata["FLOPs"] / 1e9:.2f}')
    known = {column for row in figures.values() for column, _ in row}
    columns = ['M parameters', *(c for c in (f'{d}, G MACs' for d in DATA) if c in known)]

    def cell(row: dict, column: str) -> str:
        own, twin = (
            ' / '.join(sorted(row.get((column, side), ()), key=float)) for side in (False, True)
        )
        return f'{own} ({twin})' if twin else own

    body = [
        (f'`{name}`', *(cell(figures[name], column) for column in columns))
        for name in sorted(figures, key=size_key)
    ]
    return markdown(('backbone', *columns), body)


def network_name(config: str) -> tuple[str, bool]:
    """``('dge-pvt-s', True)`` of ``mask-rcnn_dge-pvt-s-dense_fpn_...``: network, whether a twin."""
    head, *others = config.split('_')
    name = head if re.match(r'\d+xb', others[0]) else others[0]  # classifiers begin with it
    words = [SHORT.get(word, word) for word in name.split('-') if word != 'dense']
    return '-'.join(words), '-dense' in name


def published() -> str:
    """Results in metafiles, which are those of the methods' authors."""
    rows = []
    for folder in sorted(path.parent.name for path in ROOT.glob('configs/*/metafile.yml')):
        for model in metafile(folder)['Models']:
            if 'Results' not in model:
                continue
            metrics = {k: v for result in model['Results'] for k, v in result['Metrics'].items()}
            source = model['Converted From']
            rows.append(
                (f'[`{model["Name"]}`](../{model["Config"]})', model['Results'][0]['Dataset'],
                 ', '.join(f'{name} {value}' for name, value in metrics.items()),
                 ', '.join(f'[{kind.lower()}]({url})' for kind, url in source.items()))
            )  # fmt: skip
    return markdown(('config', 'data', 'published by the authors', 'source'), rows)
