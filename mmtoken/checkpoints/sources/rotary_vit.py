"""Plain ViTs with rotary positions: DINOv3 (arXiv 2508.10104) and EVA-02 (arXiv 2303.11331).

Our names are those of timm's ViT. Its Eva class, from which timm builds both, has LayerScale under
another name, and projections in parts, which :func:`~mmtoken.checkpoints.fit.fit` joins: keys of
EVA-02 have no bias. Frequencies are not learned, and left out.

Sources: timm (Apache-2.0); github.com/facebookresearch/dinov3 and the files of Hugging Face's
transformers, whose weights have a licence of their own, the DINOv3 License.
"""

from collections.abc import Mapping

from torch import Tensor

from . import vit
from .source import Layout, Renamed, Source, rename_with

COMMON = (vit.HEADS, vit.PRETRAINING, (r'rope\.', None))
timm = rename_with(
    *COMMON,
    (r'blocks\.(\d+)\.gamma_(\d)$', r'blocks.\1.ls\2.gamma'),
    (r'blocks\.(\d+)\.attn\.([qv])_bias$', r'blocks.\1.attn.\2_proj.bias'),
    (r'blocks\.(\d+)\.attn\.k_bias$', None),  # a buffer of zeros
)
_transformers = rename_with(
    *vit.TRANSFORMERS,
    (r'rope_embeddings\.', None),
    (r'embeddings\.patch_embeddings\.', 'patch_embed.proj.'),
    (r'layer\.(\d+)\.attention\.o_proj\.', r'blocks.\1.attn.proj.'),
    (r'layer\.(\d+)\.attention\.([qkv]_proj)\.', r'blocks.\1.attn.\2.'),
    (r'layer\.(\d+)\.mlp\.gate_proj\.', r'blocks.\1.mlp.fc1_g.'),
    (r'layer\.(\d+)\.mlp\.up_proj\.', r'blocks.\1.mlp.fc1.'),
    (r'layer\.(\d+)\.mlp\.down_proj\.', r'blocks.\1.mlp.fc2.'),
    (r'layer\.(\d+)\.(norm\d)\.', r'blocks.\1.\2.'),
)
_official = rename_with(
    *COMMON,
    (r'rope_embed\.', None),
    (r'local_cls_norm\.', None),
    (r'cls_norm\.', None),
    (r'storage_tokens$', 'reg_token'),
    (r'blocks\.(\d+)\.attn\.qkv\.bias_mask$', None),
    (r'blocks\.(\d+)\.mlp\.w1\.', r'blocks.\1.mlp.fc1_g.'),
    (r'blocks\.(\d+)\.mlp\.w2\.', r'blocks.\1.mlp.fc1_x.'),
    (r'blocks\.(\d+)\.mlp\.w3\.', r'blocks.\1.mlp.fc2.'),
)


def transformers(state: Mapping[str, Tensor]) -> Renamed:
    """Hugging Face's names; where there is a gate, ``up_proj`` is what it multiplies."""
    renamed = _transformers(state)
    if not any('.fc1_g.' in name for name in renamed):
        return renamed
    return {name.replace('.fc1.', '.fc1_x.'): found for name, found in renamed.items()}


def official(state: Mapping[str, Tensor]) -> Renamed:
    """Meta's names; a mask of the biases, which is 0 for keys, is multiplied into them."""
    renamed = _official(state)
    for new, (old, tensor) in renamed.items():
        mask = state.get(f'{old}_mask')
        if mask is not None:
            renamed[new] = (old, tensor * mask.to(tensor.dtype))
    return renamed


PATCHES = r'patch_embed\.proj\.weight'
ROTARY_VIT = Source(
    'rotary-vit',
    layouts=(
        Layout(
            'DINOv3 official', (PATCHES, 'storage_tokens', r'blocks\.0\.norm1\.weight'), official
        ),
        Layout(
            'transformers',
            (r'embeddings\.patch_embeddings\.weight', r'layer\.0\.attention\.q_proj\.weight'),
            transformers,
        ),
        Layout(
            'timm Eva', (PATCHES, r'blocks\.0\.(gamma_1|attn\.q_bias|attn\.q_proj\.weight)'), timm
        ),
    ),
    known_keys=vit.NAMES,
    ignorable_keys=f'cls_token|{vit.PATCH_STEM}',
    newly_initialized_keys=(*vit.FRESH, vit.NORM),
    check=vit.check_arguments,
)
