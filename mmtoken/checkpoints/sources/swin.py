"""Plain Swin (arXiv 2103.14030). Our names are Microsoft's.

A dense twin with ``stem='patch'`` takes all of it. Semantic blocks take what they share with Swin
blocks (norms, projections, MLPs), which is a warm start: their LayerScale is fresh. Structured
blocks begin as those of the file, see :mod:`~mmtoken.checkpoints.structure`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .source import Layout, Renamed, Source, rename_with
from .vit import STRUCTURED_STEM

PARAM = r'\.(weight|bias)'
OUTPUT_NORMS = rf'norm\d?{PARAM}'  # of a classifier, or of the maps of a detector
PATCH_STEM = rf'patch_embed\.(proj|norm){PARAM}'
NAMES = (
    rf'{PATCH_STEM}|{OUTPUT_NORMS}'
    rf'|layers\.\d+\.blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){PARAM}'
    r'|layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table'
    rf'|layers\.\d+\.downsample\.(norm{PARAM}|reduction\.weight)'
)
# What our models can have beyond a plain Swin
CONV_STEM = r'patch_embed\.proj\.\d\..*'
SEMANTIC = r'.*\.layer_scale_[12]|.*\.conv_pos\..*|.*\.semantic_token2'

HEAD = (r'head\.', None)
BUFFERS = (r'.*\.(attn_mask|relative_position_index)$', None)
MARK = r'layers\.0\.blocks\.0\.attn\.qkv\.weight'

microsoft = rename_with(HEAD, BUFFERS)


def timm(state: Mapping[str, Tensor]) -> Renamed:
    """In timm a stage begins with the downsampling that ours, like Microsoft's, end with."""
    renamed = {}
    for name, value in microsoft(state).items():
        found = re.fullmatch(r'layers\.(\d+)\.downsample\.(.*)', name)
        if found:
            name = f'layers.{int(found[1]) - 1}.downsample.{found[2]}'
        renamed[name] = value
    return renamed


_openmmlab = rename_with(
    HEAD,
    BUFFERS,
    (r'patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.', r'layers.\1.blocks.\2.attn.'),
    (r'stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.', r'layers.\1.blocks.\2.mlp.fc1.'),
    (r'stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.', r'layers.\1.blocks.\2.mlp.fc2.'),
    (r'stages\.', 'layers.'),
)


def openmmlab(state: Mapping[str, Tensor]) -> Renamed:
    """Patch merging has the order of ``nn.Unfold`` in mmdet, mmseg and mmpretrain.

    Channel c of row i and column j of a patch is at ``4 * c + 2 * i + j`` there, and at
    ``(2 * j + i) * C + c`` here.
    """
    renamed = _openmmlab(state)
    for name, (old, tensor) in renamed.items():
        if '.downsample.' in name:
            merged = tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3)
            renamed[name] = (old, merged.flatten(-3))
    return renamed


SWIN = Source(
    'swin',
    layouts=(
        Layout('OpenMMLab', (r'stages\.0\.blocks\.0\.attn\.w_msa\.qkv\.weight',), openmmlab),
        Layout('Microsoft', (MARK, r'layers\.0\.downsample\.reduction\.weight'), microsoft),
        Layout('timm', (MARK, r'layers\.1\.downsample\.reduction\.weight'), timm),
    ),
    known_keys=NAMES,
    ignorable_keys=f'{PATCH_STEM}|{OUTPUT_NORMS}',
    newly_initialized_keys=(CONV_STEM, SEMANTIC, STRUCTURED_STEM),
)
