"""Plain ViT (arXiv 2010.11929), DeiT (arXiv 2012.12877), MAE (arXiv 2111.06377). Names are timm's.

Facebook's releases have them too. A DeiT without a distillation token is a ViT, and so is an MAE
without its decoder: its sine-cosine positions are stored as learned ones are.
"""

import inspect

import torch
from torch import nn

from ..report import OURS
from .source import Layout, Rename, Renamed, Source, State, rename_with

PARAM = r'\.(weight|bias)'
ATTENTION = r'qkv|q|kv|proj|[qkv]_proj|[qk]_norm'
NAMES = (
    rf'cls_token|reg_token|pos_embed|patch_embed\.proj{PARAM}|(norm|fc_norm){PARAM}'
    rf'|blocks\.\d+\.(norm[12]|attn\.({ATTENTION})|mlp\.(fc[12]|fc1_[gx]|norm)|router\.gate){PARAM}'
    r'|blocks\.\d+\.ls[12]\.gamma'
    r'|(gate|gate_loss|label_loss|patch_embed_coarse)\..*'
)
HEADS = (r'(head|head_dist|pre_logits)\.', None)
PRETRAINING = (r'mask_token$|decoder_', None)
# What DINOv2 and DINOv3 share in Hugging Face's transformers
TRANSFORMERS = (
    (r'embeddings\.mask_token', None),
    (r'embeddings\.cls_token', 'cls_token'),
    (r'embeddings\.register_tokens', 'reg_token'),
    (r'(?:encoder\.)?layer\.(\d+)\.layer_scale(\d)\.lambda1', r'blocks.\1.ls\2.gamma'),
)
# What our models of dynamic granularity have beyond a plain ViT or PVT, and those of mixed scale
GRAINED = (rf'.*\.router\.gate{PARAM}', r'budget\..*')
MIXED = (r'gate\..*', r'gate_loss\..*', r'label_loss\..*', r'patch_embed_coarse\..*')
# The stem of structure-aware tokens, which has other layers than a projection of patches
STRUCTURED_STEM = rf'patch_embed\.((conv|norm)[12]{PARAM}|plane_pos)'
PATCH_STEM = rf'patch_embed\.proj{PARAM}'
# Fine-tuned on the mean over tokens, an MAE has fc_norm behind the mean, and no norm for tokens.
NORM = rf'norm{PARAM}'


def without_distillation(rename: Rename) -> Rename:
    """Drop the distillation token after renaming, and its position, the second."""

    def rename_and_drop(state: State) -> Renamed:
        renamed = rename(state)
        if renamed.pop('dist_token', None) is not None and 'pos_embed' in renamed:
            old, positions = renamed['pos_embed']
            renamed['pos_embed'] = (old, torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
        return renamed

    return rename_and_drop


def check_arguments(file: State, state: State, model: nn.Module) -> None:
    """Refuse what only a model that is built with other arguments has a place for.

    Args:
        file: Names and tensors as they are in a file, where some names alone mean a SwiGLU.
        state: The same by our names.
        model: Any; it is compared if it is a plain ViT.

    Raises:
        ValueError: The model has layer scale or learned positions and the file has not, or one of
            them has a SwiGLU, or their numbers of registers differ; the message names the argument.
    """
    own = model.state_dict()
    if 'blocks.0.norm1.weight' not in own:  # of another family, as its names will tell
        return
    name, arguments = type(model).__name__, inspect.signature(type(model)).parameters

    def refuse(what: str, argument: str, value: object) -> None:
        remedy = f'set {argument}={value}' if argument in arguments else f'it takes no {argument}'
        raise ValueError(f'{what}; {remedy}')

    if 'blocks.0.ls1.gamma' in own and 'blocks.0.ls1.gamma' not in state:  # the reverse is folded
        refuse(f'{name} has layer scale, it has none', 'layer_scale', None)
    named = any('.w12.' in key or '.weights_in.' in key for key in file)
    gated = is_gated(state) or named, is_gated(own)
    if gated[0] != gated[1]:
        theirs, ours = ('a SwiGLU' if g else 'a plain MLP' for g in gated)
        refuse(f'its blocks have {theirs}, those of {name} {ours}', 'arch', 'that of these weights')
    if 'pos_embed' in own and 'pos_embed' not in state:
        refuse(
            'it has no learned positions', 'arch', "that of these weights, such as 'dinov3-base'"
        )
    theirs, ours = (s['reg_token'].shape[1] if 'reg_token' in s else 0 for s in (state, own))
    if theirs != ours:
        refuse(f'it has {theirs} register tokens, {name} has {ours}', 'num_registers', theirs)


def is_gated(state: State) -> bool:
    """Whether MLPs are SwiGLUs: the gate has a name of its own, or doubles the hidden channels."""
    if 'blocks.0.mlp.fc1_g.weight' in state:
        return True
    inner = [state.get(f'blocks.0.mlp.{layer}.weight') for layer in ('fc1', 'fc2')]
    return all(w is not None for w in inner) and inner[0].shape[0] != inner[1].shape[1]


timm = without_distillation(rename_with(HEADS, PRETRAINING))
# mmseg's attention is nn.MultiheadAttention, which stacks its projections as timm does.
openmmlab = without_distillation(
    rename_with(
        HEADS,
        PRETRAINING,
        (r'patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'layers\.(\d+)\.ln(\d)\.', r'blocks.\1.norm\2.'),
        (r'layers\.(\d+)\.attn\.gamma1\.weight', r'blocks.\1.ls1.gamma'),
        (r'layers\.(\d+)\.ffn\.gamma2\.weight', r'blocks.\1.ls2.gamma'),
        (r'layers\.(\d+)\.attn\.attn\.in_proj_', r'blocks.\1.attn.qkv.'),
        (r'layers\.(\d+)\.attn\.attn\.out_proj\.', r'blocks.\1.attn.proj.'),
        (r'layers\.(\d+)\.ffn\.w12\.', r'blocks.\1.mlp.fc1.'),
        (r'layers\.(\d+)\.ffn\.w3\.', r'blocks.\1.mlp.fc2.'),
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
FRESH = (*GRAINED, *MIXED, STRUCTURED_STEM)
DEIT = Source(
    'deit',
    LAYOUTS,
    NAMES,
    ignorable_keys=PATCH_STEM,
    newly_initialized_keys=FRESH,
    key_signature='dist_token',
    check=check_arguments,
)
VIT = Source(
    'vit',
    LAYOUTS,
    NAMES,
    ignorable_keys=PATCH_STEM,
    newly_initialized_keys=(*FRESH, NORM),
    check=check_arguments,
)
