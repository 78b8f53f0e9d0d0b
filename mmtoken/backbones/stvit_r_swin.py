"""STViT-R on Swin, for dense prediction and for classification.

Source: STViT-R, arXiv 2303.08685; released detection backbone and classifier,
github.com/changsn/STViT-R-Object-Detection and github.com/changsn/STViT-R (MIT). Parameter names
are the official ones.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

from ..arguments import as_tuple
from ..layers.common.stem import ConvStem, PatchEmbed
from ..layers.common.swin import PatchMerging, SwinStage
from ..layers.common.utils import drop_path_rates
from ..layers.stvit.neighborhood import PadMask
from ..layers.stvit.semantic_swin import (
    UNIT_DEPTH,
    SemanticStage,
    WindowSpec,
    classification_unit,
    dense_unit,
)
from ..registry import MODELS
from .swin_base import SwinBackbone

Form = Literal['dense', 'classification']
STEMS = dict(conv=ConvStem, patch=PatchEmbed)
SEMANTIC_STAGE = 2


@MODELS.register_module()
class STViTRSwin(SwinBackbone):
    """Swin whose third stage works on semantic tokens and recovers the image tokens.

    The third stage, which has most of the blocks, is made of units of six
    (:mod:`mmtoken.layers.stvit.semantic_swin`); the other stages are plain Swin. The maps have
    strides 4, 8, 16 and 32, and any image size is accepted.

    There are two forms with the same parameters: for dense prediction, where semantic attention
    reaches the neighborhood of a window, and for classification, where it reaches the whole image.
    The released detectors start from classifiers of the other form.

    Padding: the padding of a batch is treated like the image, as in Swin. In the first two stages
    the maps are those of the image alone wherever no window reaches the padding. From the third
    stage on, where semantic tokens see the whole image, all values differ; more so with the
    released ``pad_mask``, which hides valid tokens depending on the size of the grid. The dense
    twin is exact away from the padding in all stages.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with the keys ``embed_dims``,
            ``depths`` and ``num_heads`` (one number a stage; the third depth a multiple of 6).
        form: ``'dense'`` or ``'classification'``; see above. As in Swin, a classifier does not
            shift the windows of a grid that is no larger than a window, while a detector does.
        stem: ``'conv'``, two strided convolutions as in STViT-R, or ``'patch'``, the patch
            embedding of Swin, for weights of a plain Swin.
        in_channels: Channels of the image.
        window_size: Side of an attention window, in tokens.
        semantic_size: Side of a window after pooling, in semantic tokens. ``None`` gives the
            dense twin: ordinary Swin blocks throughout.
        key_sizes: Sides of the patches a window attends to in the pool block and the reduce block
            (in image tokens) and the recover block (in semantic tokens). Dense form only.
        pad_mask: How padding is hidden from semantic attention. ``'released'`` is what the
            official checkpoints were trained with, including its bugs; ``'exact'`` hides padding
            and nothing else; ``None`` hides nothing. See
            :class:`~mmtoken.layers.stvit.neighborhood.NeighborhoodSpec`. Dense form only.
        shortcut: Keep the freshly pooled tokens and add the first attention to them. By default
            True in the dense form, which has no other mode, and False in the classification form,
            as released.
        use_global: Add learned centers to the semantic tokens of the first unit; the authors
            report little benefit. They are resampled to other grids than that of a 224-pixel image.
        conv_pos: Add a depth-wise convolution to freshly pooled semantic tokens.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Stages whose maps are returned.
        frozen_stages: Stages kept fixed, counted from the stem; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        with_cp: Recompute activations in backward (per block; per unit in the third stage).
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(embed_dims=16, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2))
        >>> maps = STViTRSwin(arch)(torch.zeros(1, 3, 64, 96))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    """

    arch_zoo = dict(
        tiny=dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
        small=dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
        base=dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    )

    twin_args = dict(semantic_size=None)

    # A classifier has the last of the output norms only.
    ignorable_keys = r'norm\d\..*'
    newly_initialized_keys = r'norm\d\..*|.*\.num_batches_tracked'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        form: Form = 'dense',
        stem: Literal['conv', 'patch'] = 'conv',
        in_channels: int = 3,
        window_size: int = 7,
        semantic_size: int | None = 3,
        key_sizes: Sequence[int] = (14, 21, 27),
        pad_mask: PadMask = 'released',
        shortcut: bool | None = None,
        use_global: bool = False,
        conv_pos: bool = False,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        depths, num_heads = arch['depths'], arch['num_heads']
        if semantic_size is not None:
            _check_semantics(depths, window_size, semantic_size, key_sizes, pad_mask)
        _check_form(form, stem, shortcut)
        super().__init__(arch, out_indices, frozen_stages, norm_eval, init_cfg)

        windows = WindowSpec(window_size, semantic_size, pad_mask)
        if form == 'dense':
            unit = partial(dense_unit, windows=windows, key_sizes=as_tuple(key_sizes))
        else:
            unit = partial(classification_unit, windows=windows)
        self.patch_embed = STEMS[stem](arch['embed_dims'], in_channels)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)[: self.num_built]):
            dims = self.feature_info.channels(i)
            block_kwargs = dict(embed_dims=dims, num_heads=num_heads[i], mlp_ratio=mlp_ratio)
            downsample = PatchMerging(dims) if i + 1 < self.num_built else None
            if semantic_size and i == SEMANTIC_STAGE:
                stage = SemanticStage(
                    block_kwargs, rates, windows, unit,
                    shortcut=form == 'dense' or bool(shortcut), conv_pos=conv_pos,
                    use_global=use_global, downsample=downsample, with_cp=with_cp,
                )  # fmt: skip
            else:
                stage = SwinStage(
                    block_kwargs, rates, window_size, form == 'dense', downsample, with_cp
                )
            stages.append(stage)
        self.finish_init(stages)


def _check_semantics(
    depths: tuple[int, ...],
    window_size: int,
    semantic_size: int,
    key_sizes: Sequence[int],
    pad_mask: PadMask,
) -> None:
    if not 1 <= semantic_size <= window_size:
        raise ValueError(
            f'semantic_size must be from 1 to window_size={window_size}, or None for the dense '
            f'twin, got {semantic_size}'
        )
    if len(depths) <= SEMANTIC_STAGE or depths[SEMANTIC_STAGE] % UNIT_DEPTH:
        raise ValueError(
            f'there must be a third depth, a multiple of {UNIT_DEPTH}, the blocks of a unit; '
            f'got depths={depths}'
        )
    strides, key_sizes = (window_size, window_size, semantic_size), as_tuple(key_sizes)
    if len(key_sizes) != 3 or any(k < s for k, s in zip(key_sizes, strides, strict=True)):
        raise ValueError(f'key_sizes are three sides no smaller than {strides}, got {key_sizes}')
    if pad_mask not in ('released', 'exact', None):
        raise ValueError(f"pad_mask must be 'released', 'exact' or None, got {pad_mask!r}")


def _check_form(form: Form, stem: str, shortcut: bool | None) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form must be 'dense' or 'classification', got {form!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be 'conv' or 'patch', got {stem!r}")
    if form == 'dense' and shortcut is False:
        raise ValueError('the dense form always has the shortcut; it was given shortcut=False')
