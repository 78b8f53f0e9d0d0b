"""Convert renamed tensors to the names and shapes of a model, as far as possible."""

import math
import re
import warnings
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    resample_abs_pos_embed,
    resample_patch_embed,
    resize_rel_pos_bias_table,
    to_2tuple,
)
from timm.models import adapt_input_conv
from torch import Tensor

from .layer_scale import fold_scales
from .report import Report
from .sources.source import is_square
from .structure import structure_layers

BIAS_TABLE = 'relative_position_bias_table'
# Learned tokens of a grid, (1, H * W, C), and the attribute of the same module that has (H, W);
# without it, the grid is square.
GRIDS = dict(pos_embed='pos_grid', centers='center_grid', semantic_token2='center_grid')
# Tokens before those of the patches that have positions; registers have none.
PREFIX_TOKENS = ('cls_token', 'dist_token')
PATCHES = 'patch_embed.proj.weight'  # of a ViT

# Projections, and how else files have them: of a cross-attention block, and in timm's Eva
JOINED = (
    ('qkv', ('q', 'kv')),
    ('qkv', ('q_proj', 'k_proj', 'v_proj')),
    ('q', ('q_proj',)),
    ('kv', ('k_proj', 'v_proj')),
    ('fc1', ('fc1_g', 'fc1_x')),
)
COARSE_AND_FINE = ('patch_embed_coarse', 'patch_embed')  # of MSViT
RGB = 3

State = dict[str, Tensor]


def fit(state: State, module: nn.Module, report: Report) -> State:
    """Rename, split, drop and resize tensors that the model has in another form.

    * A classifier's ``norm`` becomes the output norm of a model that has exactly one. With several
      maps it is not used, as in the released detectors.
    * ``attn.qkv`` is split where the model has ``attn.q`` and ``attn.kv``, or ``attn.v`` alone.
      Such a block has queries from other tokens, or another block's attention map; it has no bias
      table of windows, which is dropped.
    * ``attn.q`` and ``attn.kv`` are joined where the model has ``attn.qkv``, and so are timm's
      ``attn.q_proj``, ``attn.k_proj`` and ``attn.v_proj``, where keys may lack a bias (the last two
      where the model has ``attn.kv``), and the two halves of a SwiGLU.
    * LayerScale is multiplied into the layers before it where the model has none, see
      :mod:`~mmtoken.checkpoints.layer_scale`.
    * Structured layers are initialized from plain ones so that they compute the same, see
      :mod:`~mmtoken.checkpoints.structure`.
    * Bias tables are interpolated as in timm. Position embeddings are not: the module takes over
      their grid (:func:`adopt_grids`), and resamples them once, to the grid of an image. Without a
      class token in the model, its position is dropped; without one in the file, it is zero.
    * Registers have no position: positions of registers in a file are added to them.
    * The patch embedding of a ViT is resampled as in FlexiViT (arXiv 2212.08013): a patch that is
      enlarged to the model's size has the same embedding as before.
    * Biases of zero are added to projections that have none in a file, as in mmseg's ViT.
    * If a file has no projection of coarse patches, theirs is that of fine patches, applied to the
      means of pixels.
    * Weights for 3 channels are adapted to another number as in timm: for one channel they are
      summed; otherwise they are repeated and scaled, so that their sum stays.

    What cannot be fitted stays as it is.

    Args:
        state: Our names and tensors; not changed.
        module: The model.
        report: Is updated. ``newly_initialized`` gets names of which the model keeps its own values
            although the file has some; ``grids`` those of positions with another grid.
    """
    state, own = dict(state), module.state_dict()
    stem = tuple(f'{name}.' for name in getattr(module, 'stem_names', ('patch_embed',)))
    _name_output_norm(state, own, report)
    _split_attention(state, own, report)
    _join_projections(state, own, report)
    fold_scales(state, own, report)  # while the layers have their plain names
    structure_layers(state, own, report)
    _free_registers(state, own, report)
    _add_biases(state, own, report)
    for name in [name for name in own if name in state]:
        old = tuple(state[name].shape)
        if name.endswith(BIAS_TABLE):
            state[name] = _resize_table(name, state, own, module)
        elif name.rpartition('.')[2] in GRIDS:
            state[name] = _resize_grid(name, state, own, module, report)
        elif name == PATCHES and 'blocks.0.norm1.weight' in own:
            state[name] = _resize_patches(state[name], own[name])
        if name.startswith(stem) and state[name].ndim == 4:
            state[name] = _adapt_channels(state[name], own[name].shape, report)
        if old != tuple(state[name].shape):
            in_file = report.resized.get(name, (old,))[0]
            report.resized[name] = (in_file, tuple(state[name].shape))
    _enlarge_patches(state, own, report)
    return state


def _name_output_norm(state: State, own: State, report: Report) -> None:
    outputs = [name for name in own if re.fullmatch(r'norm\d\.weight', name)]
    if len(outputs) != 1 or outputs[0] in state or 'norm.weight' not in state:
        return
    if own[outputs[0]].shape == state['norm.weight'].shape:
        for kind in ('weight', 'bias'):
            new = outputs[0].replace('weight', kind)
            state[new] = state.pop(f'norm.{kind}')
            report.mapped[new] = report.mapped.pop(f'norm.{kind}')


def _split_attention(state: State, own: State, report: Report) -> None:
    for name in list(state):
        attn, _, kind = name.rpartition('qkv.')
        query, key_value, value = (f'{attn}{part}.{kind}' for part in ('q', 'kv', 'v'))
        crosses = query in own and key_value in own
        if name in own or not (crosses or value in own):
            continue
        joint, old = state.pop(name), report.mapped.pop(name)
        channels = len(joint) // 3
        if crosses:
            parts = {query: joint[:channels], key_value: joint[channels:]}
        else:
            parts = {value: joint[2 * channels :]}
            report.resized[value] = (tuple(joint.shape), tuple(parts[value].shape))
        state |= parts
        report.mapped |= dict.fromkeys(parts, old)
        report.split.append(old)
        if state.pop(attn + BIAS_TABLE, None) is not None:
            report.dropped.append(report.mapped.pop(attn + BIAS_TABLE))


def _join_projections(state: State, own: State, report: Report) -> None:
    for name in own:
        for joint, parts in JOINED:
            layer, found, kind = name.rpartition(f'{joint}.')
            names = [f'{layer}{part}.{kind}' for part in parts]
            present = [part for part in names if part in state]
            absent = [part for part in names if part not in state]
            windowed = f'{layer}{BIAS_TABLE}' in own  # attention in parts has no windows
            lacks = any(not part.endswith('k_proj.bias') for part in absent)
            if not found or windowed or name in state or lacks:
                continue
            zero = torch.zeros_like(state[present[0]])  # the bias of keys
            state[name] = torch.cat([state.pop(part, zero) for part in names])
            old = [report.mapped.pop(part) for part in present]
            report.mapped[name] = old[0]
            if len(names) > 1:
                report.joined += old


def _free_registers(state: State, own: State, report: Report) -> None:
    """Give positions to the class token and the patches only, in a file with registers.

    In timm either class token, registers and patches have positions, or the patches alone
    (``no_embed_class``, as in its DINOv2). Positions of registers are added to the registers; a
    class token without a position gets one of zero. The model computes the same. Which of the two
    a file has follows from the number of patches, which is a square.
    """
    if not {'reg_token', 'pos_embed'} <= state.keys() & own.keys():
        return
    registers, positions = state['reg_token'], state['pos_embed']
    first, length = _prefix_length(state, ''), positions.shape[1]
    behind = first + registers.shape[1]
    if positions.shape == own['pos_embed'].shape or is_square(length - first):
        return
    if is_square(length):
        zero = positions.new_zeros(1, first, positions.shape[-1])
        state['pos_embed'] = torch.cat([zero, positions], dim=1)
    elif is_square(length - behind):
        state['reg_token'] = registers + positions[:, first:behind]
        state['pos_embed'] = torch.cat([positions[:, :first], positions[:, behind:]], dim=1)
    else:
        return
    report.resized['pos_embed'] = (tuple(positions.shape), tuple(state['pos_embed'].shape))


def _add_biases(state: State, own: State, report: Report) -> None:
    """Give projections of patches, or of attention, the bias that none of them has in a file."""
    for layer in ('patch_embed.proj', 'attn.proj', 'attn.qkv', 'attn.q', 'attn.kv'):
        biases = [name for name in own if name.endswith(f'{layer}.bias')]
        if not state.keys() & set(biases):
            for name in biases:
                weight = state.get(name.replace('bias', 'weight'))
                if weight is not None:
                    state[name] = weight.new_zeros(len(weight))
                    report.identity_init.append(name)


def _resize_table(name: str, state: State, own: State, module: nn.Module) -> Tensor:
    table, shape = state[name], own[name].shape
    if table.shape == shape or table.shape[1:] != shape[1:] or not is_square(len(table)):
        return table
    window = module.get_submodule(name.rpartition('.')[0]).window_size
    with warnings.catch_warnings():  # of timm's own indexing, hundreds of times
        warnings.simplefilter('ignore', UserWarning)
        return resize_rel_pos_bias_table(table, to_2tuple(window), tuple(shape))


def _resize_patches(weight: Tensor, own: Tensor) -> Tensor:
    if weight.ndim != 4 or weight.shape[:2] != own.shape[:2]:
        return weight
    return resample_patch_embed(weight, list(own.shape[2:]))


def _enlarge_patches(state: State, own: State, report: Report) -> None:
    """Initialize a projection of coarse patches from that of fine ones, if a file has none."""
    for kind in ('weight', 'bias'):
        fine, coarse = f'patch_embed.proj.{kind}', f'patch_embed_coarse.proj.{kind}'
        if fine in state and coarse in own and coarse not in state:
            sides = [own[f'{name}.proj.weight'].shape[-1] for name in COARSE_AND_FINE]
            if sides[0] % sides[1]:
                continue
            ratio = sides[0] // sides[1]
            state[coarse] = enlarge(state[fine], ratio) if kind == 'weight' else state[fine]
            report.mapped[coarse] = report.mapped[fine]


def enlarge(kernel: Tensor, ratio: int) -> Tensor:
    """A projection of coarse patches that equals that of fine ones on the means of their pixels.

    ``(C, in_channels, side, side) -> (C, in_channels, ratio * side, ratio * side)``.
    """
    return F.interpolate(kernel, scale_factor=ratio, mode='nearest') / ratio**2


def _adapt_channels(weight: Tensor, shape: torch.Size, report: Report) -> Tensor:
    """The first layer for images of another number of channels than 3."""
    channels = weight.shape[1], shape[1]
    if channels[0] != RGB or channels[1] == RGB or weight.shape[2:] != shape[2:]:
        return weight
    report.channels = channels
    return adapt_input_conv(channels[1], weight)


def _resize_grid(name: str, state: State, own: State, module: nn.Module, report: Report) -> Tensor:
    """Positions with the model's prefix tokens; resized, if the module cannot change its grid."""
    tokens, shape = state[name], own[name].shape
    parent, _, last = name.rpartition('.')
    if tokens.ndim != 3 or tokens.shape[-1] != shape[-1]:
        return tokens
    given = wanted = 0
    if last == 'pos_embed':
        given, wanted = _prefix_length(state, parent), _prefix_length(own, parent)
    length = shape[1] - wanted
    if not report.is_ours and tokens.shape[1] == length and is_square(length):
        given = 0  # as with timm's no_embed_class, where class tokens have no position
    prefix, places = tokens[:, :given], tokens[:, given:]
    if not given:  # zero does not change a class token, newly initialized or without a position
        prefix = tokens.new_zeros(1, wanted, tokens.shape[-1])
    if wanted not in (0, prefix.shape[1]):
        return tokens
    owner = module.get_submodule(parent)
    # 64 positions of our own may be 4 x 16; those of other files are taken for 8 x 8.
    if not (report.is_ours and places.shape[1] == length):
        if not is_square(places.shape[1]):
            return tokens
        old, new = (math.isqrt(places.shape[1]),) * 2, _grid_of(owner, GRIDS[last], length)
        if hasattr(owner, GRIDS[last]):
            if old != tuple(new):
                report.grids[name] = old
        elif new is None:
            return tokens
        elif old != new:
            places = resample_abs_pos_embed(places, new, old, num_prefix_tokens=0)
    return torch.cat([prefix[:, :wanted], places], dim=1)


def has_grids(module: nn.Module) -> bool:
    """Whether a module has positions whose grid :func:`adopt_grids` can change."""
    return any(
        hasattr(owner, attribute) for owner in module.modules() for attribute in GRIDS.values()
    )


def grids_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of learned positions to their grids, as :func:`adopt_grids` takes them."""
    grids = {}
    for name, _ in module.named_parameters():
        parent, _, last = name.rpartition('.')
        if last in GRIDS and hasattr(module.get_submodule(parent), GRIDS[last]):
            grids[name] = getattr(module.get_submodule(parent), GRIDS[last])
    return grids


def adopt_grids(module: nn.Module, grids: Mapping[str, tuple[int, int]]) -> None:
    """Change the grids of learned positions, whose values are to be loaded from a checkpoint.

    Parameters stay the same objects, so an optimizer keeps them.

    Args:
        module: Has positions ``(1, prefix + H * W, C)`` and, beside each, an attribute ``(H, W)``.
        grids: Names of positions to their new ``(H, W)``, from :class:`Report`.
    """
    for name, grid in grids.items():
        parent, _, last = name.rpartition('.')
        owner = module.get_submodule(parent)
        positions, old = getattr(owner, last), getattr(owner, GRIDS[last])
        length = positions.shape[1] - math.prod(old) + math.prod(grid)
        positions.grad = None
        positions.data = positions.data.new_zeros(1, length, positions.shape[-1])
        setattr(owner, GRIDS[last], tuple(grid))


def _prefix_length(state: State, parent: str) -> int:
    names = [f'{parent}.{token}' if parent else token for token in PREFIX_TOKENS]
    return sum(state[name].shape[1] for name in names if name in state)


def _grid_of(owner: nn.Module, attribute: str, length: int) -> tuple[int, int] | None:
    """Rows and columns of ``length`` learned tokens: as the model says, or else a square."""
    grid = getattr(owner, attribute, None)
    if grid is None:  # as in timm
        grid = getattr(getattr(owner, 'patch_embed', None), 'grid_size', None)
    if grid is None and is_square(length):
        grid = (math.isqrt(length),) * 2
    return None if grid is None else tuple(grid)
