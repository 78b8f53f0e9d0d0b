"""DINOv2 (arXiv 2304.07193), with or without registers (arXiv 2309.16588). Our names are timm's.

A plain ViT with layer scale and patches of 14 pixels. DeiT III has the same names in timm and
mmpretrain, so it is read as this too. Models without layer scale take it folded, see
:mod:`~mmtoken.checkpoints.layer_scale`. The giant model has a SwiGLU as MLP.

Source: github.com/facebookresearch/dinov2 (Apache-2.0): released backbones, and what its training
saves, where blocks may be in chunks (``blocks.CHUNK.BLOCK``, the latter counted from the first
chunk on) and beside the heads of the teacher, or of teacher and student.
"""

from collections.abc import Mapping

from torch import Tensor

from . import vit
from .source import Layout, Renamed, Source, rename_with

PATCHES = r'patch_embed\.proj\.weight'
SCALE = r'blocks\.0\.ls1\.gamma'
TEACHER = r'teacher\.backbone\.'
RULES = (
    vit.HEADS,
    vit.PRETRAINING,
    (r'register_tokens$', 'reg_token'),
    (r'blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.', r'blocks.\1.mlp.fc1.'),
    (r'blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.', r'blocks.\1.mlp.fc2.'),
    (r'blocks\.\d+\.(\d+)\.', r'blocks.\1.'),
)


def teacher(state: Mapping[str, Tensor]) -> Renamed:
    """The teacher is what is released; the student and all heads are left out."""
    names = {name.removeprefix('teacher.backbone.'): name for name in state}
    taken = {new: state[old] for new, old in names.items() if new != old}
    return {new: (names[old], tensor) for new, (old, tensor) in official(taken).items()}


official = rename_with(*RULES)
transformers = rename_with(
    *vit.TRANSFORMERS,
    (r'embeddings\.position_embeddings', 'pos_embed'),
    (r'embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'encoder\.layer\.(\d+)\.attention\.attention\.([qkv])[a-z]+\.', r'blocks.\1.attn.\2_proj.'),
    (r'encoder\.layer\.(\d+)\.attention\.output\.dense\.', r'blocks.\1.attn.proj.'),
    (r'encoder\.layer\.(\d+)\.mlp\.weights_in\.', r'blocks.\1.mlp.fc1.'),
    (r'encoder\.layer\.(\d+)\.mlp\.weights_out\.', r'blocks.\1.mlp.fc2.'),
    (r'encoder\.layer\.', 'blocks.'),
    (r'layernorm\.', 'norm.'),
)

DINOV2 = Source(
    'dinov2',
    layouts=(
        Layout('official', (PATCHES, 'mask_token', r'blocks\.0\.(0\.)?ls1\.gamma'), official),
        Layout('training', (TEACHER + PATCHES, TEACHER + 'mask_token'), teacher),
        Layout('timm', (PATCHES, SCALE), official),
        Layout(
            'transformers',
            (r'embeddings\.position_embeddings', r'encoder\.layer\.0\.layer_scale1\.lambda1'),
            transformers,
        ),
        Layout(
            'mmpretrain',
            (r'layers\.0\.ln1\.weight', r'layers\.0\.attn\.gamma1\.weight'),
            vit.openmmlab,
        ),
    ),
    known_keys=vit.NAMES,
    ignorable_keys=f'cls_token|{vit.PATCH_STEM}',
    newly_initialized_keys=vit.FRESH,
    check=vit.check_arguments,
)
