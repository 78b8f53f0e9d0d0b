"""MSViT: a plain ViT on tokens of mixed scale, for classification and for dense prediction.

Source: MSViT, arXiv 2307.02321. Only its loss was released; what the paper leaves open is decided
here, see :class:`MSViT`. Parameter names are timm's where timm has the layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..arguments import as_tuple
from ..checkpoints.fit import enlarge
from ..layers.common.old_tiles import chunked_apply
from ..layers.common.packed import SparseFeatures
from ..layers.common.padding import padding_regions, valid_size
from ..layers.common.regions import (
    CellSet,
    RegionLayout,
    concat_granularities,
    make_region_layout,
    pool_cells,
    select_granularity,
)
from ..layers.common.routing import choose, explores
from ..layers.common.stem import PatchStem, pad_to_stride, patchify
from ..layers.common.utils import join_maps, run_block, to_map
from ..layers.common.vit import NORM_EPS, ViTBlock
from ..layers.msvit.gate import ScaleGate
from ..layers.msvit.mixed_scale import MixedScaleLayout, build_layout, mix_all
from ..registry import MODELS
from ..runtime.aux_losses import publish, should_publish
from ..runtime.decisions import RoutingDecision, record_decision
from .base import PlainBackbone, check_out_type, trunc_normal_parameter

OutType = Literal['map', 'tokens', 'cls_token', 'avg_featmap']
TrainMode = Literal['masked', 'gathered']
GateInput = Literal['embed', 'pixels']
GATE = dict(loss=dict(type='mmtoken.BatchShapingLoss', target_coarse_ratio=0.5))
EXTRA, FINE, COARSE = range(3)  # levels of cells


@MODELS.register_module()
class MSViT(PlainBackbone):
    """ViT whose image regions enter as one coarse token or as several fine ones.

    A gate looks at each region of ``coarse_size`` pixels and decides, once, before the first block.
    Nothing is discarded, so dense maps lack nothing: a coarse token is copied to all places of its
    region. With fine tokens everywhere it is ViT.

    Padding: regions wholly in the padding of a batch are coarse and do not count, whatever their
    colour where the sizes of images are known (:class:`mmtoken.TokenLossHook`,
    :func:`mmtoken.follow_image_sizes`, :func:`mmtoken.set_image_sizes`). Elsewhere trailing zeros
    are taken for padding, and the black lower part of an image too. The gate sees one region at a
    time, so padding of zeros changes no choice. Tokens of padding are keys like any others, and
    positions are resampled to the padded grid: maps differ from those of the image alone.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict with the keys
            ``embed_dims``, ``num_layers``, ``num_heads`` and ``feedforward_channels``.
        coarse_size: Side of a region, in pixels; a multiple of ``fine_size``.
        fine_size: Side of a patch that becomes a fine token, in pixels.
        gate: Arguments of the gate, all optional: ``hidden_channels``, ``num_layers`` and
            ``start_ratio`` as for :class:`~mmtoken.layers.msvit.gate.ScaleGate`; ``input``,
            ``'embed'`` for the coarse embedding of a region or ``'pixels'``; ``temperature`` of the
            sigmoid whose gradient the gate has; ``loss``, config of the loss that shapes its
            decisions, with which training needs :class:`mmtoken.TokenLossHook`, or None. ``None``
            instead of a dict gives the dense twin: ViT.
        share_patch_embed: Embed a region, scaled down to ``fine_size``, by the projection of fine
            patches, as the paper does. Otherwise it has a projection of its own.
        train_mode: How the gate gets its gradient; both have the same forward values.
            ``'masked'`` computes tokens of both scales everywhere and hides those not in use as
            keys, so that a gate learns what the other scale would have changed. ``'gathered'``
            computes only tokens in use, as inference does, and a gate learns from these alone:
            less time and memory, and fused attention.
        cls_token: Whether there is a class token, as in most weights.
        num_registers: Register tokens, as in some weights of DINOv2.
        layer_scale: Initial LayerScale; None for none. Weights of DINOv2 need it.
        window_size: Side of the windows that bound attention, in fine tokens: a multiple of
            ``coarse_size / fine_size``. None for no windows. Windows need ``cls_token=False``.
        global_blocks: Blocks whose attention windows do not bound; negative ones count from the
            end. By default the last of each quarter of the network, as in ViTDet.
        img_size: Image that the position embedding is laid out for, in pixels: a side, or
            ``(H, W)``. Images of any size are accepted.
        in_channels: Channels of the image.
        qkv_bias: Biases for queries, keys and values.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_indices: Blocks that are tapped, in rising order; negative ones count from the end. The
            last block is normalised, as in mmpretrain.
        out_type: ``'map'`` returns dense maps. ``'tokens'`` returns
            :class:`~mmtoken.layers.common.packed.SparseFeatures` for :class:`mmtoken.MixedScaleNeck`. For
            classification, ``'cls_token'`` is the normalised class token of the last block and
            ``'avg_featmap'`` the mean over its normalised map.
        frozen_stages: Blocks kept fixed: 0 freezes the gate and the patch and position embedding,
            1 the first block too, and so on; -1 freezes nothing.
        norm_eval: Of no effect here, since there is no batch norm.
        with_cp: Recompute the activations of each block in backward.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: Bad argument values; the message says what is allowed.
        TypeError: ``arch`` is neither a name nor a dict.
    """

    stem_names = ('patch_embed', 'patch_embed_coarse', 'cls_token', 'reg_token', 'pos_embed')
    twin_args = dict(gate=None)
    ignorable_keys = (
        r'(head|head_dist|norm|fc_norm|gate|gate_loss|patch_embed_coarse)\..*|cls_token|dist_token'
    )
    newly_initialized_keys = r'(gate|gate_loss|patch_embed_coarse)\..*'
    arch_zoo: ClassVar[dict[str, dict]] = dict(
        PlainBackbone.arch_zoo,
        large=dict(embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096),
    )

    def __init__(
        self,
        arch: str | Mapping = 'small',
        coarse_size: int = 32,
        fine_size: int = 16,
        gate: Mapping | None = GATE,
        share_patch_embed: bool = True,
        train_mode: TrainMode = 'masked',
        cls_token: bool = True,
        num_registers: int = 0,
        layer_scale: float | None = None,
        window_size: int | None = None,
        global_blocks: Iterable[int] | None = None,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (-1,),
        out_type: OutType = 'map',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = self.resolve_arch(arch)
        dims, depth, heads = arch['embed_dims'], arch['num_layers'], arch['num_heads']
        if coarse_size <= fine_size or coarse_size % fine_size:
            raise ValueError(
                f'coarse_size must be a multiple of fine_size={fine_size}, from '
                f'{2 * fine_size} on, got {coarse_size}'
            )
        if train_mode not in get_args(TrainMode):
            raise ValueError(f'train_mode must be one of {get_args(TrainMode)}, got {train_mode!r}')
        super().__init__(
            dims, depth, img_size, fine_size, in_channels,
            out_indices, frozen_stages, norm_eval, init_cfg, cls_token,
        )  # fmt: skip
        check_out_type(out_type, get_args(OutType), self.out_indices, depth - 1, cls_token)
        self.out_type = out_type
        self.out_channels = (dims,) * len(self.out_indices)
        self.train_mode = train_mode
        self.with_cp = with_cp
        self.reg_token = None
        if num_registers:
            self.reg_token = trunc_normal_parameter(1, num_registers, dims)
        self.num_prefix_tokens = int(cls_token) + num_registers
        self.window_size = window_size
        self.global_blocks = self.check_windows(window_size, global_blocks, depth, coarse_size)

        gate = None if gate is None else dict(gate)
        # Cells of a region: fine ones, and the region itself if there is a gate.
        self.ratio = coarse_size // fine_size
        self.granularities = (1,) if gate is None else (1, self.ratio)
        self.gate = self.gate_loss = self.patch_embed_coarse = None
        if gate is not None:
            if not share_patch_embed:
                self.patch_embed_coarse = PatchStem(dims, in_channels, coarse_size, norm=False)
                self.patch_embed_coarse.proj.load_state_dict(
                    dict(
                        weight=enlarge(self.patch_embed.proj.weight, self.ratio),
                        bias=self.patch_embed.proj.bias,
                    )
                )
            self.make_gate(gate, dims, in_channels * coarse_size**2)

        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList(
            ViTBlock(dims, heads, arch['feedforward_channels'], qkv_bias, rate, layer_scale)
            for rate in rates[: self.num_built]
        )
        # Only where something uses it, since DDP refuses parameters without a gradient.
        normed = depth - 1 in self.out_indices
        self.norm = nn.LayerNorm(dims, NORM_EPS) if normed else nn.Identity()
        self.train()

    def make_gate(self, gate: dict, embed_dims: int, pixel_values: int) -> None:
        """Build the gate and its loss from their arguments.

        Raises:
            ValueError: Unknown arguments, or values that are not allowed.
        """
        loss = gate.pop('loss', GATE['loss'])
        self.gate_input = gate.pop('input', 'embed')
        self.temperature = gate.pop('temperature', 1.0)
        if self.gate_input not in get_args(GateInput):
            raise ValueError(
                f"gate['input'] must be one of {get_args(GateInput)}, got {self.gate_input!r}"
            )
        if not self.temperature > 0:
            raise ValueError(f"gate['temperature'] must be above 0, got {self.temperature}")
        allowed = ('hidden_channels', 'num_layers', 'start_ratio')
        if not set(gate) <= set(allowed):
            raise ValueError(
                f'gate takes {("input", "temperature", "loss", *allowed)}, '
                f'got {sorted(set(gate) - set(allowed))}'
            )
        self.gate = ScaleGate(embed_dims if self.gate_input == 'embed' else pixel_values, **gate)
        if loss is not None:
            self.gate_loss = MODELS.build(loss)

    def check_windows(
        self, window_size: int | None, global_blocks: Iterable[int] | None, depth: int, coarse: int
    ) -> frozenset[int]:
        """Blocks whose attention is global.

        Raises:
            ValueError: Windows that cut regions, or with extra tokens, or global blocks that there
                are not, or without windows.
        """
        if window_size is None:
            if global_blocks is not None:
                raise ValueError('global_blocks needs window_size; without windows all are global')
            return frozenset(range(depth))
        ratio = coarse // self.patch_size
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

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        """As for all backbones; the gate is fixed with the stem."""
        gate = [part for part in (self.gate, self.gate_loss) if part is not None]
        frozen = super().frozen_modules()
        return frozen + gate if frozen else frozen

    def output_layers(self, index: int) -> list[nn.Module]:
        return [self.norm] if index == self.num_stages - 1 else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | tuple[SparseFeatures, ...]:
        """Compute the taps.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W. For padding see the class.

        Returns:
            One for each of ``out_indices``, according to ``out_type``: a map
            ``(B, C, ceil(H / fine_size), ceil(W / fine_size))``, tokens, or a vector ``(B, C)``.
        """
        tokens, mixture = self.embed_mixed(x)
        taps = []
        for i, block in enumerate(self.blocks):
            attend = partial(mixture.attend, windowed=i not in self.global_blocks)
            tokens = run_block(block, tokens, attend, mixture.lengths, recompute=self.with_cp)
            if i in self.out_indices:
                taps.append(self._tap(i, tokens, mixture))
        return join_maps(taps)

    def embed_mixed(self, x: Tensor) -> tuple[Tensor, MixedScaleLayout]:
        """Choose a scale for each region and embed it.

        Args:
            x: Images, ``(B, in_channels, H, W)``.

        Returns:
            Packed tokens with their positions, ``(M, C)``, and where they stand.
        """
        batch = len(x)
        grid = tuple(-(-side // self.patch_size) for side in x.shape[-2:])
        regions = make_region_layout(
            grid, self.granularities, self.ratio, self.num_prefix_tokens, x.device
        )
        window = None if self.window_size is None else self.window_size // self.ratio
        extra, position = self.extra_tokens(grid)
        levels = {EXTRA: extra}
        if self.gate is None:
            mixture = mix_all(regions, batch, window)
        else:
            coarse = self.embed_coarse(x)
            gates = self.choose_scales(x, coarse, regions)
            mixture = build_layout(gates, regions, window, self.train_mode == 'masked')
            coarse = coarse + pool_cells(position, self.ratio)
            levels[COARSE] = coarse.flatten(1, 2)
        packed = {
            level: select_granularity(tokens.expand(batch, -1, -1), level, mixture.cells)
            for level, tokens in levels.items()
        }
        position = position.flatten(1, 2).expand(batch, -1, -1)
        fine = self.embed_fine(x, mixture.cells)
        packed[FINE] = fine + select_granularity(position, FINE, mixture.cells)
        tokens = concat_granularities([packed[level] for level in sorted(packed)], mixture.cells)
        return mixture.pack(tokens), mixture

    def extra_tokens(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Class and register tokens ``(1, E, C)``, and positions of the grid ``(1, H, W, C)``."""
        position = self.positions(grid)
        extra = position[:, :0]
        if self.cls_token is not None:
            extra = self.cls_token + position[:, :1]
            position = position[:, 1:]
        if self.reg_token is not None:
            extra = torch.cat([extra, self.reg_token], dim=1)
        return extra, position.unflatten(1, grid)

    def embed_coarse(self, x: Tensor) -> Tensor:
        """Embed whole regions, without positions: ``(B, in_channels, H, W) -> (B, Hr, Wr, C)``."""
        if self.patch_embed_coarse is not None:
            return self.patch_embed_coarse(x)
        x = pad_to_stride(x, self.patch_size * self.ratio)
        return self.patch_embed(F.avg_pool2d(x, self.ratio))

    def embed_fine(self, x: Tensor, cells: CellSet) -> Tensor:
        """Embed the patches whose regions are fine, without positions.

        All patches are embedded where somebody's own layer may need to see those around one.

        Args:
            x: Images, ``(B, in_channels, H, W)``.
            cells: The tokens there are.

        Returns:
            Packed fine tokens, ``(m, C)``.
        """
        stem = self.patch_embed
        if isinstance(stem, PatchStem) and stem.takes_patches_alone():
            patches = patchify(x, self.patch_size).flatten(1, 2)
            return stem.embed_some(select_granularity(patches, FINE, cells))
        return select_granularity(stem(x).flatten(1, 2), FINE, cells)

    def choose_scales(self, x: Tensor, coarse: Tensor, regions: RegionLayout) -> Tensor:
        """One-hot choices, with gradients in training, and their loss published.

        Args:
            x: Images, ``(B, in_channels, H, W)``.
            coarse: From :meth:`embed_coarse`.
            regions: Of the grid of fine tokens.

        Returns:
            Fine and coarse, ``(B, Hr, Wr, 2)``.
        """
        if self.gate_input == 'pixels':
            seen = patchify(x, self.patch_size * self.ratio)
        else:
            seen = coarse.detach()  # the gate reads the embedding, and does not shape it
        scores, sampled = self.gate(seen), explores(self.gate, seen)
        padding = padding_regions(valid_size(x), self.patch_size, regions)
        gates = choose(
            scores, regions.num_cells, 'coarse_ratio', sampled, padding, self.temperature
        )
        choice = gates.argmax(dim=-1)
        record_decision(
            RoutingDecision(
                choice, self.granularities, self.ratio, regions.grid, padding, per_network=True
            )
        )
        if self.gate_loss is not None and should_publish(self.gate.training):
            real = ~padding
            loss = self.gate_loss(scores.softmax(dim=-1)[..., 1], real)
            ratio = (choice * real).sum() / real.sum().clamp(min=1)
            publish(dict(loss_gate=loss, coarse_ratio=ratio))
        return gates

    def _tap(
        self, index: int, tokens: Tensor, mixture: MixedScaleLayout
    ) -> Tensor | SparseFeatures:
        """The output behind one block."""
        if index == self.num_stages - 1:
            tokens = chunked_apply(self.norm, tokens, training=self.training, layers=(self.norm,))
        if self.out_type == 'cls_token':
            return torch.stack([image[0] for image in tokens.split(mixture.lengths)])
        if self.out_type == 'tokens':
            return mixture.features(tokens)
        dense = mixture.restore(tokens)[:, self.num_prefix_tokens :]
        if self.out_type == 'avg_featmap':
            return dense.mean(dim=1)
        return to_map(dense.unflatten(1, mixture.cells.regions.grid))
