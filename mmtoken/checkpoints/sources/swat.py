"""SWAT (arXiv 2111.13677) as released: its Swin and its DeiT. Ours differ in a few names.

What the paper names after the stem's convolutions is numbered in the order of use here, and each
pair of ``qkv`` and ``qkv_linear`` is one layer with two parts. Its Mixers and ResMLPs, whose
weights are for one number of tokens, are refused.

Source: github.com/kkahatapitiya/SWAT (MIT), classifiers.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ..report import OURS
from . import swin, vit
from .source import Layout, Renamed, Source, rename_with

PARAM = swin.PARAM
BLOCK = r'(?:layers\.\d+\.)?blocks\.\d+\.'
FIRST_BLOCK = r'(?:layers\.0\.)?blocks\.0\.'
NAMES = (
    rf'{vit.STRUCTURED_STEM}|pos_embed|{swin.OUTPUT_NORMS}'
    rf'|{BLOCK}(norm[12]|attn\.(qkv|proj)(\.linear|\.conv)?|mlp\.(fc[12]|dwconv)){PARAM}'
    rf'|{BLOCK}attn\.relative_position_bias_table'
    rf'|layers\.\d+\.downsample\.(norm{PARAM}|reduction\.weight)'
)

_official = rename_with(
    swin.HEAD,
    swin.BUFFERS,
    (r'patch_embed\.proj21\.', 'patch_embed.conv1.'),
    (r'patch_embed\.proj22\.', 'patch_embed.conv2.'),
    (r'patch_embed\.norm2\.', 'patch_embed.norm1.'),
    (r'patch_embed\.norm\.', 'patch_embed.norm2.'),
    (r'patch_embed\.pos_embed2$', 'patch_embed.plane_pos'),
    (rf'({BLOCK})attn\.(qkv|proj)_linear\.', r'\1attn.\2.linear.'),
    (rf'({BLOCK})mlp\.fc3\.', r'\1mlp.dwconv.'),
)


def official(state: Mapping[str, Tensor]) -> Renamed:
    """Beside a ``qkv_linear``, ``qkv`` is its convolution; alone, it is a Linear layer.

    Layers of the MLP are 1 x 1 convolutions there.
    """
    if not any('.attn.' in name for name in state):
        raise ValueError(
            'it has no attention, so it is a Mixer or ResMLP of SWAT, whose weights are for one '
            "number of tokens and which our backbones are not; take SWAT's Swin or DeiT"
        )
    renamed = {}
    for name, (old, tensor) in _official(state).items():
        layer, _, kind = name.rpartition('.')
        if re.fullmatch(rf'{BLOCK}attn\.(qkv|proj)', layer) and f'{layer}_linear.weight' in state:
            name = f'{layer}.conv.{kind}'
        if re.fullmatch(rf'{BLOCK}mlp\.fc[12]', layer):
            tensor = tensor.flatten(1) if kind == 'weight' else tensor
        renamed[name] = (old, tensor)
    return renamed


SWAT = Source(
    'swat',
    layouts=(
        Layout('official', (r'(patch_embed|stem)\.proj21\.weight',), official),
        # Converted before
        Layout(
            OURS,
            (r'patch_embed\.conv1\.weight', rf'{FIRST_BLOCK}attn\.qkv\.linear\.weight'),
            rename_with(swin.HEAD),
        ),
    ),
    known_keys=NAMES,
    ignorable_keys=swin.OUTPUT_NORMS,
)
