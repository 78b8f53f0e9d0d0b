"""SWAT on Swin: structure-aware tokens, for classification and for dense prediction.

Source: SWAT, arXiv 2111.13677; released code, github.com/kkahatapitiya/SWAT (MIT), which works at
224 pixels only and finds the settings of a stage by the size of its grid.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ..layers.common.stem import PatchEmbed
from ..layers.common.swin import PatchMerging, SwinStage
from ..layers.common.utils import drop_path_rates
from ..layers.swat.structured import StructuredMerging, StructuredStem, StructuredSwinBlock
from ..registry import MODELS
from .swin_base import PATCH_SIZE, SwinBackbone


class Structure(NamedTuple):
    """What the tokens of a stage look like, and how far their convolutions reach.

    Attributes:
        side: Side of the planes, in cells of two pixels.
        attn_kernel_size: Of the convolutions inside the tokens, in cells.
        mlp_kernel_size: Of the convolutions of the token grid, in tokens.
        merging_kernel_size: Of the convolution that leads to the next stage, in cells.
        everywhere: Whether blocks with shifted windows have convolutions inside the tokens too.
    """

    side: int
    attn_kernel_size: int
    mlp_kernel_size: int
    merging_kernel_size: int | None
    everywhere: bool


# In the release shifted blocks have no convolutions inside the tokens; at 224 pixels the last grid
# is as large as a window, so that no block shifts there. Weights tell which kind a block is.
STRUCTURES = (
    Structure(2, 1, 5, 3, everywhere=False),
    Structure(4, 1, 5, 5, everywhere=False),
    Structure(8, 3, 5, 9, everywhere=False),
    Structure(16, 5, 3, None, everywhere=True),
)


@MODELS.register_module()
class SWATSwin(SwinBackbone):
    """Swin whose tokens keep the spatial structure of their patches.

    A token holds planes of cells of 2 x 2 pixels, and half as many, four times as large ones in
    each further stage. Convolutions mix the channels of a token along its planes (beside the
    projections of attention), tokens along their grid (in the MLP), and all cells as one map where
    stages meet. The maps have strides 4, 8, 16 and 32, and any image size is accepted.

    As in the release, windows are not shifted on a grid that is no larger than a window.

    Padding: the padding of a batch is image like any other, as in Swin. Maps are those of the image
    alone wherever no window and no convolution of the blocks before reaches the padding, but for a
    grid that padding makes larger than a window: its windows then shift.

    Args:
        arch: ``'tiny'``, ``'small'``, or a dict with the keys ``embed_dims``, ``depths`` and
            ``num_heads`` (one number a stage, at most four stages). With n stages ``embed_dims``
            is a multiple of ``4 * 2**(n - 1)``, which leaves the last stage a plane.
        structured: ``False`` gives the dense twin: plain Swin.
        in_channels: Channels of the image.
        window_size: Side of an attention window, in tokens.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Stages whose maps are returned.
        frozen_stages: Stages kept fixed, counted from the stem; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> import torch
        >>> arch = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2))
        >>> backbone = SWATSwin(arch, out_indices=(0, 1)).eval()
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 96))]
        [(1, 16, 16, 24), (1, 32, 8, 12)]
    """

    arch_zoo = dict(
        tiny=dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
        small=dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    )

    twin_args = dict(structured=False)

    # A classifier has the last of the output norms only.
    ignorable_keys = r'norm\d\..*'
    newly_initialized_keys = r'norm\d\..*'

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        structured: bool = True,
        in_channels: int = 3,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        super().__init__(arch, out_indices, frozen_stages, norm_eval, init_cfg)
        depths, num_heads = arch['depths'], arch['num_heads']

        if structured:
            self.patch_embed = StructuredStem(
                arch['embed_dims'], PATCH_SIZE, STRUCTURES[0].side, 2, in_channels, norm=True
            )
        else:
            self.patch_embed = PatchEmbed(arch['embed_dims'], in_channels, PATCH_SIZE)
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)[: self.num_built]):
            dims, structure = self.feature_info.channels(i), STRUCTURES[i]
            common = dict(embed_dims=dims, num_heads=num_heads[i], mlp_ratio=mlp_ratio)
            blocks = downsample = None
            if structured:
                blocks = structured_blocks(len(rates), structure)
            if i + 1 < self.num_built:
                downsample = (
                    StructuredMerging(dims, structure.side, structure.merging_kernel_size)
                    if structured
                    else PatchMerging(dims)
                )
            stages.append(SwinStage(common, rates, window_size, False, downsample, with_cp, blocks))
        self.finish_init(stages)

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for Swin; more than four stages, or channels that are no whole
                planes in the last.
        """
        arch = super().resolve_arch(arch)
        embed_dims, stages = arch['embed_dims'], len(arch['depths'])
        if stages > len(STRUCTURES):
            raise ValueError(f'there are at most {len(STRUCTURES)} stages, got {stages} depths')
        multiple = STRUCTURES[0].side ** 2 * 2 ** (stages - 1)
        if embed_dims % multiple:
            raise ValueError(
                f'embed_dims={embed_dims} is no multiple of {multiple}, so that stage '
                f'{stages - 1} would not have whole planes'
            )
        return arch


def structured_blocks(depth: int, structure: Structure) -> list[partial]:
    """What makes each block of a stage; blocks with odd indices are those that shift."""
    return [
        partial(
            StructuredSwinBlock,
            side=structure.side,
            attn_kernel_size=structure.attn_kernel_size
            if structure.everywhere or j % 2 == 0
            else None,
            mlp_kernel_size=structure.mlp_kernel_size,
        )
        for j in range(depth)
    ]
