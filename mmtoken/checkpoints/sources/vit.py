"""Plain ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877). Our names are timm's.

Facebook's releases have them too. A DeiT without a distillation token is a ViT.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..report import OURS
from .source import Layout, Rename, Renamed, Source, rename_with

PARAM = r'\.(weight|bias)'
ATTENTION = r'qkv|q|kv|proj'
NAMES = (
    rf'cls_token|pos_embed|patch_embed\.proj{PARAM}|(norm|fc_norm){PARAM}'
    rf'|blocks\.\d+\.(norm[12]|attn\.({ATTENTION})|mlp\.fc[12]|router\.gate){PARAM}'
    r'|blocks\.\d+\.ls[12]\.gamma'
)
HEADS = (r'(head|head_dist|pre_logits)\.', None)
# What our models of dynamic granularity have beyond a plain ViT or PVT
GRAINED = (rf'.*\.router\.gate{PARAM}', r'budget\..*')


def without_distillation(rename: Rename) -> Rename:
    """Drop the distillation token after renaming, and its position, the second."""

    def rename_and_drop(state: Mapping[str, Tensor]) -> Renamed:
        renamed = rename(state)
        if renamed.pop('dist_token', None) is not None and 'pos_embed' in renamed:
            old, positions = renamed['pos_embed']
            renamed['pos_embed'] = (old, torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
        return renamed

    return rename_and_drop


timm = without_distillation(rename_with(HEADS))
# mmseg's attention is nn.MultiheadAttention, which stacks its projections as timm does.
openmmlab = without_distillation(
    rename_with(
        HEADS,
        (r'patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'layers\.(\d+)\.ln(\d)\.', r'blocks.\1.norm\2.'),
        (r'layers\.(\d+)\.attn\.attn\.in_proj_', r'blocks.\1.attn.qkv.'),
        (r'layers\.(\d+)\.attn\.attn\.out_proj\.', r'blocks.\1.attn.proj.'),
        (r'layers\.(\d+)\.ffn\.layers\.0\.0\.', r'blocks.\1.mlp.fc1.'),
        (r'layers\.(\d+)\.ffn\.layers\.1\.', r'blocks.\1.mlp.fc2.'),
        (r'layers\.', 'blocks.'),
        (r'ln1\.', 'norm.'),
        (r'ln2\.', 'fc_norm.'),
    )
)

LAYOUTS = (
    Layout('mmpretrain', (r'layers\.0\.ln1\.weight', r'layers\.0\.attn\.qkv\.weight'), openmmlab),
    Layout('mmseg', (r'layers\.0\.ln1\.weight', r'layers\.0\.attn\.attn\..*'), openmmlab),
    Layout('timm', (r'patch_embed\.proj\.weight', r'blocks\.0\.attn\.qkv\.weight'), timm),
    # Fitted to split projections before, or of a dense twin that has them
    Layout(OURS, (r'patch_embed\.proj\.weight', r'blocks\.0\.attn\.kv\.weight'), timm),
)
DEIT = Source('deit', LAYOUTS, NAMES, fresh=GRAINED, sign='dist_token')
VIT = Source('vit', LAYOUTS, NAMES, fresh=GRAINED)
