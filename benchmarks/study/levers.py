"""Variants of backbones that the study alone needs: levers that were tried, and a baseline.

They are in MMEngine's registry, not in that of mmtoken, which holds what is for users.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmtoken.backbones.dge_deit import DGEDeiT, RoutedLayout
from mmtoken.backbones.msvit import MSViT
from mmtoken.backbones.vit_base import DenseLayout
from mmtoken.layers.common.regions import RegionLayout, pool_cells, unpool_cells
from mmtoken.layers.common.stem import pad_to_stride
from mmtoken.layers.msvit.mixed_scale import PackedLayout


@MODELS.register_module()
class FewerLayersMSViT(MSViT):
    """The output of an earlier block passes the norm that stands behind the last one, too."""

    has_norm = True

    def output(self, index: int, tokens: Tensor, layout: DenseLayout) -> list[Tensor]:
        is_last = index == self.num_stages - 1
        return super().output(index, tokens if is_last else self.norm(tokens), layout)


@MODELS.register_module()
class LearnedMergeMSViT(MSViT):
    """A coarse token gets, beside the embedding of its region scaled down, a learned merge of the
    embeddings of the region's patches. It starts as zero."""

    newly_initialized_keys = rf'{MSViT.newly_initialized_keys}|merge\..*'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.merge = zeros(nn.Linear(self.ratio**2 * self.embed_dims, self.embed_dims))

    def embed_coarse(self, x: Tensor) -> Tensor:
        coarse = super().embed_coarse(x)  # (B, Hr, Wr, C)
        side = self.ratio
        patches = self.patch_embed(pad_to_stride(x, self.patch_size * side))  # (B, H, W, C)
        regions = patches.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return coarse + self.merge(regions.permute(0, 1, 3, 2, 4, 5).flatten(3))


@MODELS.register_module()
class DetailMSViT(MSViT):
    """The copies of a coarse token differ by what the patch embedding sees in each place: a
    projection of its difference from the mean of the region, added to the last map. It starts as
    zero."""

    newly_initialized_keys = rf'{MSViT.newly_initialized_keys}|detail\..*'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.detail = zeros(nn.Linear(self.embed_dims, self.embed_dims))

    def choose_scales(
        self, x: Tensor, coarse: Tensor, patches: Tensor | None, regions: RegionLayout
    ) -> Tensor:
        self.patches = self.patch_embed(x) if patches is None else patches  # (B, H, W, C)
        return super().choose_scales(x, coarse, patches, regions)

    def restore(self, index: int, tokens: Tensor, layout: PackedLayout) -> Tensor:
        tokens = super().restore(index, tokens, layout)
        patches = self.patches
        mean = unpool_cells(pool_cells(patches, self.ratio), self.ratio, patches.shape[1:3])
        coarse = unpool_cells(layout.choice[..., None].float(), self.ratio, patches.shape[1:3])
        detail = (self.detail(patches - mean) * coarse).flatten(1, 2)
        return torch.cat(
            [
                tokens[:, : self.num_prefix_tokens],
                tokens[:, self.num_prefix_tokens :] + detail,
            ],
            dim=1,
        )


@MODELS.register_module()
class InterpolatedDGEDeiT(DGEDeiT):
    """What a trained block adds to the tokens of the grid passes a depth-wise 3 x 3 convolution, so
    that updates of pooled queries are interpolated. It starts as the identity."""

    newly_initialized_keys = rf'{DGEDeiT.newly_initialized_keys}|interpolate\..*'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        dims = self.embed_dims
        self.interpolate = nn.ModuleDict(
            {
                str(i): identity(nn.Conv2d(dims, dims, 3, padding=1, groups=dims, bias=False))
                for i in range(max(self.frozen_stages, 0), self.num_built)
            }
        )

    def run_block(
        self, index: int, tokens: Tensor, layout: RoutedLayout
    ) -> tuple[Tensor, RoutedLayout]:
        updated, new_layout = super().run_block(index, tokens, layout)
        if str(index) not in self.interpolate:
            return updated, new_layout
        prefix, update = (updated - tokens).split(
            [self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1
        )
        grid = update.unflatten(1, layout.grid).permute(0, 3, 1, 2)  # (B, C, H, W)
        update = self.interpolate[str(index)](grid).flatten(2).transpose(1, 2)
        return tokens + torch.cat([prefix, update], dim=1), new_layout


def zeros(layer: nn.Linear) -> nn.Linear:
    """With weights and bias of zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def identity(conv: nn.Conv2d) -> nn.Conv2d:
    """A depth-wise convolution that returns its input."""
    nn.init.dirac_(conv.weight, groups=conv.groups)
    return conv
