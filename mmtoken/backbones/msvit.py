"""MSViT: a plain ViT on tokens of mixed scale, for classification and for dense prediction.

Source: MSViT, arXiv 2307.02321. Only its loss was released; what the paper leaves open is decided
here, see :class:`MSViT`. Parameter names are timm's where timm has the layer.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..arguments import as_tuple, is_number
from ..checkpoints.fit import enlarge
from ..layers.common.gate import RegionGate, start_of
from ..layers.common.packed import SparseFeatures
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.plain import has_geometry
from ..layers.common.regions import (
    RegionLayout,
    describe_regions,
    make_region_layout,
    pool_cells,
    turn_cells,
)
from ..layers.common.rotary import rotated
from ..layers.common.routing import choose, explores, rank_regions
from ..layers.common.stem import PatchEmbed, pad_to_stride
from ..layers.common.utils import ceil_div
from ..layers.common.vit import ViTBlock
from ..layers.msvit.mixed_scale import PackedLayout, build_layout, fine_layout
from ..losses.label_purity import build_label_loss, publish_label_loss
from ..registry import MODELS, build_loss
from ..runtime.aux_losses import publish, should_publish
from ..runtime.decisions import RoutingDecision, record_decision
from .vit_base import TRUNK_OPTIONS, TRUNKS, DenseLayout, PlainBackbone

TrainMode = Literal['masked', 'gathered']
GateInput = Literal['embed', 'pixels', 'patches']
GATE = dict(loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5))


@MODELS.register_module()
class MSViT(PlainBackbone):
    """ViT whose image regions become one coarse token or several fine ones.

    A gate looks at each region of ``coarse_size`` pixels and decides, once, before the first block.
    Nothing is discarded, so dense maps are complete: a coarse token is copied to all places of its
    region. With fine tokens everywhere it is ViT.

    Padding: regions wholly in the padding of a batch are coarse and do not count, whatever their
    color where the sizes of images are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`). Elsewhere trailing zeros
    are taken for padding, and the black lower part of an image too. The gate does not see regions
    in the padding, so padding with zeros changes no choice. Tokens of padding are keys like any
    others, and positions are resampled to the padded grid: maps differ from those of the image
    alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        coarse_size: Side of a region, in pixels; a multiple of ``fine_size``.
        fine_size: Side of a patch that becomes a fine token, in pixels.
        gate: Arguments of the gate, all optional. ``None`` instead of a dict gives the dense twin:
            ViT. ``hidden_channels``, ``num_layers``, ``start_ratio`` and ``kernel_size`` are as for
            :class:`~mmtoken.layers.common.gate.RegionGate`. ``input``: ``'embed'`` for the coarse
            embedding of a region, ``'pixels'``, or ``'patches'`` for the mean and the spread of the
            embeddings of its patches, which are all computed then. ``temperature``: of the sigmoid
            whose gradient the gate has. ``loss``: config of the loss that shapes its decisions,
            with which training needs :class:`mmtoken.TokenLossHook`, or None. ``fine_ratio``: the
            share of the regions of every image that are fine, so that all images cost the same; it
            needs no ``loss``, and ``start_ratio`` follows it. ``label_loss``: config of
            :class:`mmtoken.LabelPurityLoss`, with which labels teach the gate, or None; with
            ``fine_ratio`` it learns from the labels alone.
        share_patch_embed: Embed a region, scaled down to ``fine_size``, by the projection of fine
            patches, as the paper does. Otherwise it has a projection of its own.
        train_mode: How the gate gets its gradient; both modes have the same forward values.
            ``'masked'`` computes tokens of both scales everywhere and hides those not in use as
            keys, so that a gate learns what the other scale would have changed. ``'gathered'``
            computes only tokens in use, as inference does, and a gate learns from these alone:
            less time and memory, and fused attention.
        cls_token: Whether there is a class token, as in most weights.
        window_size: Side of the attention windows, in fine tokens: a multiple of
            ``coarse_size / fine_size``. None for no windows. Windows need ``cls_token=False``.
        global_blocks: Blocks with global attention; negative ones count from the end. By default
            the last of each quarter of the network, as in ViTDet.
        kwargs: As for :class:`~mmtoken.backbones.vit_base.PlainBackbone`, without ``patch_size``.
            ``out_type='tokens'`` returns :class:`~mmtoken.layers.common.packed.SparseFeatures` for
            :class:`mmtoken.MixedScaleNeck`. ``frozen_stages=0`` freezes the gate too, except
            with a ``label_loss``.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.

    Example:
        >>> arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
        >>> backbone = MSViT(arch, cls_token=False).eval()
        >>> backbone(torch.zeros(1, 3, 64, 96))[0].shape
        torch.Size([1, 32, 4, 6])
    """

    stem_names = (*PlainBackbone.stem_names, 'patch_embed_coarse')
    out_types = ('map', 'tokens', 'cls_token', 'avg_featmap')
    fixed_args = ('patch_size',)
    arch_options = TRUNK_OPTIONS
    arch_zoo = PlainBackbone.arch_zoo | TRUNKS
    twin_args = dict(gate=None)
    ratio_name = 'coarse_ratio'
    ignorable_keys = (
        rf'{PlainBackbone.ignorable_keys}|(gate|gate_loss|label_loss|patch_embed_coarse)\..*'
    )
    newly_initialized_keys = r'(gate|gate_loss|label_loss|patch_embed_coarse)\..*'

    def __init__(
        self,
        arch: str | Mapping = 'small',
        coarse_size: int = 32,
        fine_size: int = 16,
        gate: Mapping | None = GATE,
        share_patch_embed: bool = True,
        train_mode: TrainMode = 'masked',
        cls_token: bool = True,
        window_size: int | None = None,
        global_blocks: Iterable[int] | None = None,
        **kwargs,
    ) -> None:
        if coarse_size <= fine_size or coarse_size % fine_size:
            raise ValueError(
                f'coarse_size must be a multiple of fine_size={fine_size}, from '
                f'{2 * fine_size} on, got {coarse_size}'
            )
        if train_mode not in get_args(TrainMode):
            raise ValueError(f'train_mode must be one of {get_args(TrainMode)}, got {train_mode!r}')
        super().__init__(arch, patch_size=fine_size, cls_token=cls_token, **kwargs)
        self.train_mode = train_mode
        self.ratio = coarse_size // fine_size
        self.granularities = (1,) if gate is None else (1, self.ratio)
        self.global_blocks = self.check_windows(window_size, global_blocks)
        self.window = None if window_size is None else window_size // self.ratio  # in regions
        self.budget: float | None = None  # of mmtoken.set_budget
        self.gate = self.gate_loss = self.label_loss = self.patch_embed_coarse = None
        if gate is not None:
            if not share_patch_embed:
                in_channels = self.patch_embed.proj.in_channels
                self.patch_embed_coarse = PatchEmbed(
                    self.embed_dims, in_channels, coarse_size, norm=False
                )
                self.patch_embed_coarse.proj.load_state_dict(
                    dict(
                        weight=enlarge(self.patch_embed.proj.weight, self.ratio),
                        bias=self.patch_embed.proj.bias,
                    )
                )
            self.make_gate(dict(gate), coarse_size)
        self.blocks = nn.ModuleList(
            ViTBlock(**self.block_args, drop_path=rate) for rate in self.drop_rates
        )
        self.finish_init()

    def make_gate(self, gate: dict, coarse_size: int) -> None:
        """Build the gate and its loss from their arguments.

        Raises:
            ValueError: Unknown arguments, or values that are not allowed.
        """
        self.fine_ratio = gate.pop('fine_ratio', None)
        loss = gate.pop('loss', GATE['loss'] if self.fine_ratio is None else None)
        label_loss = gate.pop('label_loss', None)
        self.gate_input = gate.pop('input', 'embed')
        self.temperature = gate.pop('temperature', 1.0)
        if self.gate_input not in get_args(GateInput):
            raise ValueError(
                f"gate['input'] must be one of {get_args(GateInput)}, got {self.gate_input!r}"
            )
        if not is_number(self.temperature) or not self.temperature > 0:
            raise ValueError(f"gate['temperature'] must be above 0, got {self.temperature}")
        if self.fine_ratio is not None and not (
            is_number(self.fine_ratio) and 0 <= self.fine_ratio <= 1
        ):
            raise ValueError(f"gate['fine_ratio'] must be from 0 to 1, got {self.fine_ratio!r}")
        allowed = ('hidden_channels', 'num_layers', 'start_ratio', 'kernel_size')
        others = ('input', 'temperature', 'loss', 'fine_ratio', 'label_loss')
        if not set(gate) <= set(allowed):
            raise ValueError(
                f'gate takes {(*others, *allowed)}, got {sorted(set(gate) - set(allowed))}'
            )
        if self.fine_ratio is not None:
            gate.setdefault('start_ratio', start_of(1 - self.fine_ratio))
        seen = dict(
            embed=self.embed_dims,
            pixels=self.patch_embed.proj.in_channels * coarse_size**2,
            patches=2 * self.embed_dims,
        )
        self.gate = RegionGate(seen[self.gate_input], **gate)
        if loss is not None:
            self.gate_loss = build_loss(loss, "gate['loss']", 'mmtoken.BatchShapingLoss')
        self.label_loss = build_label_loss(label_loss)

    @property
    def least_budget(self) -> float | None:
        """Tokens over patches where all regions are coarse; None for the dense twin."""
        return None if self.gate is None else self.ratio**-2

    def share_of_fine_regions(self) -> float | None:
        """Of each image, by :func:`mmtoken.set_budget` or by ``gate``; None where the gate says."""
        if self.budget is None:
            return self.fine_ratio
        least = self.least_budget
        return (self.budget - least) / (1 - least)

    def check_windows(
        self, window_size: int | None, global_blocks: Iterable[int] | None
    ) -> frozenset[int]:
        """Blocks whose attention is global.

        Raises:
            ValueError: Windows that cut regions, or with prefix tokens, or global blocks that do
                not exist, or without windows.
        """
        depth, ratio = self.num_stages, self.ratio
        if window_size is None:
            if global_blocks is not None:
                raise ValueError('global_blocks needs window_size; without windows all are global')
            return frozenset(range(depth))
        if window_size < ratio or window_size % ratio:
            raise ValueError(
                f'window_size must be a multiple of coarse_size / fine_size = {ratio}, '
                f'got {window_size}'
            )
        if self.num_prefix_tokens:
            raise ValueError(
                'a window has neither a class token nor registers: set cls_token=False and '
                'num_registers=0'
            )
        if global_blocks is None:
            return frozenset(depth * (i + 1) // 4 - 1 for i in range(4))
        blocks = frozenset(i + depth if i < 0 else i for i in as_tuple(global_blocks))
        if not blocks <= set(range(depth)):
            raise ValueError(
                f'global_blocks must be from {-depth} to {depth - 1}, got {sorted(blocks)}'
            )
        return blocks

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict | None:
        """mmpretrain's ViT, which has no windows."""
        if args['window_size']:
            return None
        # Tokens become a map in a neck.
        out_type = 'map' if args['out_type'] == 'tokens' else args['out_type']
        args = dict(args, patch_size=args['fine_size'], out_type=out_type)
        return super().library_baseline(args)

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        """As for all backbones; the gate is fixed with the stem, unless labels teach it."""
        gate = []
        if self.label_loss is None:
            gate = [part for part in (self.gate, self.gate_loss) if part is not None]
        frozen = super().frozen_modules()
        return frozen + gate if frozen else frozen

    def reduce(self, x: Tensor) -> tuple[Tensor, DenseLayout | PackedLayout]:
        """Choose a scale for each region and embed it.

        Args:
            x: Images, ``(B, in_channels, H, W)``.

        Returns:
            Packed tokens with their positions, ``(M, C)``, and their layout; of the dense twin
            without windows ``(B, P + H * W, C)``.
        """
        grid = tuple(ceil_div(side, self.patch_size) for side in x.shape[-2:])
        regions = make_region_layout(
            grid, self.granularities, self.ratio, self.num_prefix_tokens, x.device
        )
        regions = turn_cells(regions, self.rotation(grid, x.device))
        if self.gate is None:
            tokens, layout = self.embed(x)  # (B, P + H * W, C)
            if self.window is None:
                return tokens, layout
            layout = fine_layout(regions, len(x), self.window)
            return layout.pack(tokens), layout
        coarse = self.embed_coarse(x)  # (B, Hr, Wr, C)
        patches = self.patch_embed(x) if self.gate_input == 'patches' else None  # (B, H, W, C)
        gates = self.choose_scales(x, coarse, patches, regions)
        layout = build_layout(gates, regions, self.window, self.train_mode == 'masked')
        prefix, position = self.positions(grid)
        fine = self.embed_fine(x, layout) if patches is None else patches
        fine = (fine + position).flatten(1, 2)  # (B, H * W, C)
        coarse = (coarse + pool_cells(position, self.ratio)).flatten(1, 2)
        prefix = prefix.expand(len(x), -1, -1).to(fine)
        return layout.pack(torch.cat([prefix, fine, coarse], dim=1)), layout

    def run_block(
        self, index: int, tokens: Tensor, layout: DenseLayout | PackedLayout
    ) -> tuple[Tensor, DenseLayout | PackedLayout]:
        if isinstance(layout, DenseLayout):
            return super().run_block(index, tokens, layout)
        attn_fn = rotated(layout.attn_fn(index not in self.global_blocks), layout.rotation)
        return self.checkpoint(self.blocks[index], tokens, attn_fn, layout.lengths), layout

    def restore(self, index: int, tokens: Tensor, layout: DenseLayout | PackedLayout) -> Tensor:
        return tokens if isinstance(layout, DenseLayout) else layout.restore(tokens)

    def to_features(
        self, index: int, tokens: Tensor, layout: DenseLayout | PackedLayout
    ) -> SparseFeatures:
        if isinstance(layout, DenseLayout):
            regions = make_region_layout(
                layout.grid, (1,), self.ratio, self.num_prefix_tokens, tokens.device
            )
            return fine_layout(regions, len(tokens)).to_features(tokens.flatten(0, 1))
        return layout.to_features(tokens)

    def embed_fine(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Embed the patches of fine regions: ``(B, in_channels, H, W) -> (B, H', W', C)``.

        All other places are zero, unless a layer in the place of the patch embedding may look
        beyond a patch: then all are embedded.
        """
        stem, side = self.patch_embed, self.patch_size
        conv = getattr(stem, 'proj', None)
        alone = isinstance(conv, nn.Conv2d) and has_geometry(conv, side, side)
        if not alone or not isinstance(stem, PatchEmbed) or len(layout.fine) == layout.num_places:
            return stem(x)
        patches = F.pixel_unshuffle(pad_to_stride(x, side), side).permute(0, 2, 3, 1)
        patches = patches.flatten(0, 2)
        # Without any fine region one patch is embedded and not used, for the gradient of the layer.
        used = patches.index_select(0, layout.fine) if len(layout.fine) else patches[:1]
        # As one image, patch beside patch
        strip = used.unflatten(1, (-1, side, side)).permute(1, 2, 0, 3).flatten(2)[None]
        embedded = stem(strip).flatten(0, 2)[: len(layout.fine)]  # (m, C)
        fine = embedded.new_zeros(layout.num_places, embedded.shape[1])
        return fine.index_copy(0, layout.fine, embedded).unflatten(0, (len(x), *layout.grid))

    def embed_coarse(self, x: Tensor) -> Tensor:
        """Embed whole regions, without positions: ``(B, in_channels, H, W) -> (B, Hr, Wr, C)``."""
        if self.patch_embed_coarse is not None:
            return self.patch_embed_coarse(x)
        x = pad_to_stride(x, self.patch_size * self.ratio)
        return self.patch_embed(F.avg_pool2d(x, self.ratio))

    def choose_scales(
        self, x: Tensor, coarse: Tensor, patches: Tensor | None, regions: RegionLayout
    ) -> Tensor:
        """One-hot choices, with gradients in training, and their loss published.

        Args:
            x: Images, ``(B, in_channels, H, W)``.
            coarse: From :meth:`embed_coarse`.
            patches: Embeddings of all patches, ``(B, H, W, C)``, if the gate reads them.
            regions: Of the grid of fine tokens.

        Returns:
            Fine and coarse, ``(B, Hr, Wr, 2)``.
        """
        if self.gate_input == 'pixels':
            side = self.patch_size * self.ratio
            seen = F.pixel_unshuffle(pad_to_stride(x, side), side).permute(0, 2, 3, 1)
        elif patches is not None:
            seen = describe_regions(patches.detach(), self.ratio)
        else:
            seen = coarse.detach()  # no gradient from the gate to the embedding
        padding = padding_regions(valid_size(x), self.patch_size, regions)
        scores = self.gate(seen, padding)
        fine_ratio = self.share_of_fine_regions()
        # A gate with a fixed budget that labels teach needs no gradient of the task, which would
        # have to pass all blocks, frozen ones too.
        taught = self.label_loss is not None and fine_ratio is not None
        gates = choose(
            scores,
            regions.num_cells,
            self.ratio_name,
            explores(self.gate, seen) and not taught,
            padding,
            self.temperature,
            None if fine_ratio is None else rank_regions(scores, fine_ratio, padding),
        )
        choice = gates.argmax(dim=-1)
        record_decision(
            RoutingDecision(
                choice, self.granularities, self.ratio, regions.grid, padding, per_network=True
            )
        )
        if self.gate_loss is not None and should_publish(self.gate.training):
            valid = ~padding
            loss = self.gate_loss(scores.softmax(dim=-1)[..., 1], valid)
            ratio = (choice * valid).sum() / valid.sum().clamp(min=1)
            publish(dict(loss_gate=loss, coarse_ratio=ratio))
        side = self.patch_size * self.ratio
        publish_label_loss(
            self.label_loss, scores, x, (self.patch_size, side), side, self.gate.training
        )
        return gates
