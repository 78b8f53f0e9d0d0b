"""Plain PVT (arXiv 2102.12122). Our names are the official ones, gathered by stage.

A backbone of dynamic granularity takes all of it, and its routers are fresh; so it begins as PVT.
Source: github.com/whai362/PVT (Apache-2.0), classifiers and detectors, and mmdet's PVT.
"""

from collections.abc import Callable, Mapping
from re import Match

from torch import Tensor

from ..report import OURS
from .source import Layout, Renamed, Source, is_square, rename_with
from .vit import GRAINED, PARAM

CLASS_TOKEN = r'layers\.3\.cls_token'
CLASSIFIER = rf'{CLASS_TOKEN}|norm{PARAM}'
ATTENTION = r'q|kv|qkv|proj|sr|norm|value|offsets|weights'  # the last three are deformable PVT's
NAMES = (
    rf'layers\.\d\.(pos_embed|patch_embed\.(proj|norm){PARAM})|{CLASSIFIER}'
    rf'|layers\.\d\.blocks\.\d+\.(norm[12]|attn\.({ATTENTION})|mlp\.fc[12]|router\.gate){PARAM}'
)
OFFICIAL = (r'patch_embed1\.proj\.weight', r'block1\.0\.norm1\.weight')
MMDET = (r'layers\.0\.0\.projection\.weight', r'layers\.0\.1\.1\.attn\.attn\.in_proj_weight')
MMDET_BLOCK = r'layers\.(\d)\.1\.([1-9]\d*)\.'  # 0 is the position embedding


def in_stage(name: str) -> Callable[[Match], str]:
    """A replacement; the first group is the stage, officially counted from 1."""
    return lambda found: found.expand(f'layers.{int(found[1]) - 1}.{name}')


def _in_block(name: str) -> Callable[[Match], str]:
    return lambda found: f'layers.{found[1]}.blocks.{int(found[2]) - 1}.{name}'


RULES = (
    (r'head\.', None),
    (r'cls_token$', 'layers.3.cls_token'),
    (r'pos_embed(\d)$', in_stage('pos_embed')),
    (r'patch_embed(\d)\.', in_stage('patch_embed.')),
    (r'block(\d)\.', in_stage('blocks.')),
)
_official = rename_with(*RULES)
_mmdet = rename_with(
    (r'layers\.(\d)\.0\.projection\.', r'layers.\1.patch_embed.proj.'),
    (r'layers\.(\d)\.0\.norm\.', r'layers.\1.patch_embed.norm.'),
    (r'layers\.(\d)\.1\.0\.pos_embed$', r'layers.\1.pos_embed'),
    (rf'{MMDET_BLOCK}attn\.attn\.in_proj_', _in_block('attn.qkv.')),
    (rf'{MMDET_BLOCK}attn\.attn\.out_proj\.', _in_block('attn.proj.')),
    (rf'{MMDET_BLOCK}ffn\.layers\.0\.', _in_block('mlp.fc1.')),
    (rf'{MMDET_BLOCK}ffn\.layers\.3\.', _in_block('mlp.fc2.')),
    (MMDET_BLOCK, _in_block('')),
)


def official(state: Mapping[str, Tensor]) -> Renamed:
    """Detectors have a position for a class token that they do not have, in front; drop it."""
    renamed = _official(state)
    if 'layers.3.cls_token' not in renamed and 'layers.3.pos_embed' in renamed:
        old, positions = renamed['layers.3.pos_embed']
        if positions.ndim == 3 and is_square(positions.shape[1] - 1):
            renamed['layers.3.pos_embed'] = (old, positions[:, 1:])
    return renamed


def mmdet(state: Mapping[str, Tensor]) -> Renamed:
    """mmdet's MLP is made of 1 x 1 convolutions, and its attention stacks its projections."""
    renamed = _mmdet(state)
    for name, (old, tensor) in renamed.items():
        if '.mlp.' in name and tensor.shape[2:] == (1, 1):
            renamed[name] = (old, tensor.flatten(1))
    return renamed


PVT = Source(
    'pvt',
    layouts=(
        Layout('official', OFFICIAL, official),
        Layout('mmdet', MMDET, mmdet),
        # Converted before, or of a dense twin
        Layout(OURS, (r'layers\.0\.patch_embed\.proj\.weight',), rename_with()),
    ),
    known_keys=NAMES,
    ignorable_keys=CLASSIFIER,
    newly_initialized_keys=(CLASS_TOKEN, *GRAINED),  # detectors and mmdet have no class token
)
