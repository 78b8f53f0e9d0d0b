"""What every backbone of the package has in common."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import ClassVar

import torch
import torch.nn as nn
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor

from ..arguments import as_tuple
from ..checkpoints.module import CheckpointedBackbone
from ..layers.common.positions import resample
from ..layers.common.stem import PatchStem
from ..layers.common.utils import init_own

MAX_STAGES = 10  # of a hierarchical architecture


class TokenBackbone(CheckpointedBackbone):
    """Freezing, initialisation and layer depths of a backbone: a stem, then stages in a row.

    A stage is what ``out_indices`` and ``frozen_stages`` count: in a hierarchical backbone a module
    with a flat list ``blocks``, in a plain one (:class:`PlainBackbone`) a single block. Stages
    behind the last of ``out_indices`` are not built, since nothing would use them.

    Args:
        num_stages: Stages of the architecture.
        out_indices: Stages whose maps are returned, in rising order, or one; negative ones count
            from the end.
        frozen_stages: Stages kept fixed, counted from the stem: 0 freezes the stem, 1 the stem and
            the first stage, and so on; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialisation config, for example
            ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.

    Raises:
        ValueError: ``out_indices`` or ``frozen_stages`` out of range.
    """

    stem_names: ClassVar[tuple[str, ...]] = ('patch_embed',)  # what precedes the first block
    stages_name: ClassVar[str] = 'layers'  # the attribute that lists the stages
    twin_args: ClassVar[dict]  # constructor arguments that turn the class into its dense twin
    ignorable_keys: str | None = None  # names a checkpoint may have in excess (regular expression)
    newly_initialized_keys: str | None = None  # names it may lack

    def __init__(
        self,
        num_stages: int,
        out_indices: Iterable[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_stages = num_stages
        self.out_indices = check_out_indices(out_indices, num_stages)
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must be from -1 to {num_stages}, got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def num_built(self) -> int:
        """Stages that are built: up to the last whose map is returned."""
        return self.out_indices[-1] + 1

    @property
    def unbuilt_keys(self) -> str:
        """Names of what a checkpoint may have behind the last stage (regular expression)."""
        return rf'{self.stages_name}\.({"|".join(map(str, range(self.num_built, MAX_STAGES)))})\..*'

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, C_i, H_i, W_i)`` per index in ``out_indices``."""

    def init_fresh(self) -> None:
        """Truncated-normal Linear layers, then whatever ``init_cfg`` says.

        Layers with an ``init_weights`` of their own have the last word, before a checkpoint.
        """
        self.apply(_init_linear)
        super().init_fresh()
        init_own(self)

    def train(self, mode: bool = True) -> 'TokenBackbone':
        """As in torch, but frozen stages and, with ``norm_eval``, batch norms stay in eval mode."""
        super().train(mode)
        for frozen in self.frozen_modules():
            frozen.requires_grad_(False)
            if isinstance(frozen, nn.Module):
                frozen.eval()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def frozen_modules(self) -> list[nn.Module | nn.Parameter]:
        """The stem, stages and output layers that ``frozen_stages`` keeps fixed."""
        if self.frozen_stages < 0:
            return []
        stem = [attrgetter(name)(self) for name in self.stem_names]
        frozen = [part for part in stem if part is not None]
        for i, stage in enumerate(self.stages[: self.frozen_stages]):
            frozen.append(stage)
            if i in self.out_indices:
                frozen += self.output_layers(i)
        return frozen

    @property
    def stages(self) -> nn.ModuleList:
        return getattr(self, self.stages_name)

    def output_layers(self, index: int) -> list[nn.Module]:
        """What lies between a stage and its map."""
        return [getattr(self, f'norm{index}')]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of the layer a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: What precedes this backbone's own names, such as ``'backbone.'``.

        Returns:
            ``(depth, number of layers)``: 0 for the stem, then one per block; a downsampling layer
            at the end of a stage counts with the block before it, what precedes the blocks of a
            stage with the first of them; output layers and all else come last.
        """
        depths = [len(getattr(stage, 'blocks', (stage,))) for stage in self.stages]
        num_layers = sum(depths) + 2
        last = num_layers - 1
        if not param_name.startswith(prefix):
            return last, num_layers
        name = param_name[len(prefix) :]
        if any(f'{name}.'.startswith(f'{stem}.') for stem in self.stem_names):
            return 0, num_layers
        parts = name.split('.')
        if parts[0] != self.stages_name:
            return last, num_layers
        stage = int(parts[1])
        if parts[2] == 'blocks':
            block = int(parts[3]) + 1
        else:
            block = depths[stage] if parts[2] == 'downsample' else 1
        return sum(depths[:stage]) + block, num_layers


class PlainBackbone(TokenBackbone):
    """A plain ViT: every block is a stage, but where a subclass says otherwise. Names are timm's.

    This class makes the stem, ``patch_embed`` and ``pos_embed``; a subclass adds ``blocks``.

    Args:
        embed_dims: Channels of a token.
        num_layers: Blocks.
        img_size: Image that ``pos_embed`` is laid out for, in pixels: a side, or ``(H, W)``. Any
            other size is accepted too.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        out_indices: Blocks that are tapped, in rising order; negative ones count from the end.
        frozen_stages: Blocks kept fixed: 0 freezes the stem, 1 the stem and the first block, and
            so on; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialisation config.
        cls_token: Whether a class token goes first.
        patch_embed: Another stem than ViT's, ``(B, in_channels, H, W) -> (B, H', W', C)``.

    Raises:
        ValueError: ``out_indices`` or ``frozen_stages`` out of range.
    """

    stem_names = ('patch_embed', 'cls_token', 'pos_embed')
    stages_name = 'blocks'
    arch_keys = ('embed_dims', 'num_layers', 'num_heads', 'feedforward_channels')
    arch_zoo: ClassVar[dict[str, dict]] = dict(
        tiny=dict(embed_dims=192, num_layers=12, num_heads=3, feedforward_channels=768),
        small=dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
        base=dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
    )

    def __init__(
        self,
        embed_dims: int,
        num_layers: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        out_indices: Iterable[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
        cls_token: bool = False,
        patch_embed: nn.Module | None = None,
    ) -> None:
        super().__init__(num_layers, out_indices, frozen_stages, norm_eval, init_cfg)
        self.patch_size = patch_size
        self.patch_embed = patch_embed or PatchStem(embed_dims, in_channels, patch_size, norm=False)
        self.pos_grid = tuple(-(-side // patch_size) for side in to_2tuple(img_size))
        self.cls_token = trunc_normal_parameter(1, 1, embed_dims) if cls_token else None
        self.pos_embed = trunc_normal_parameter(1, math.prod(self.pos_grid) + cls_token, embed_dims)

    @property
    def unbuilt_keys(self) -> str | None:
        """As in other backbones, but blocks beyond those of the architecture are a mistake."""
        unbuilt = '|'.join(map(str, range(self.num_built, self.num_stages)))
        return rf'{self.stages_name}\.({unbuilt})\..*' if unbuilt else None

    @classmethod
    def resolve_arch(cls, arch: str | Mapping) -> dict:
        """Look an architecture up in the zoo, or check a user's own.

        Raises:
            ValueError, TypeError: As for :func:`resolve_arch`; heads that do not divide channels.
        """
        arch = resolve_arch(arch, cls.arch_zoo, cls.arch_keys)
        dims, heads = arch['embed_dims'], arch['num_heads']
        if dims % heads:
            raise ValueError(f'embed_dims={dims} is no multiple of num_heads={heads}')
        return arch

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed the patches and add their positions.

        Args:
            x: Images, ``(B, in_channels, H, W)``, any H and W; padded at the bottom and right to
                whole patches.

        Returns:
            Tokens ``(B, H' * W', C)``, row by row, behind the class token if there is one, and
            their grid ``(H', W')``.
        """
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x), x], dim=1)
        return x + self.positions(grid), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding of a grid, ``(1, N, C)``; that of a class token first."""
        extra = int(self.cls_token is not None)
        position = resample(self.pos_embed[:, extra:], self.pos_grid, grid, 'bicubic', True)
        return torch.cat([self.pos_embed[:, :extra], position.flatten(1, 2)], dim=1)


def trunc_normal_parameter(*shape: int) -> nn.Parameter:
    """An embedding, as ViT starts it."""
    return nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SHORT_NAMES = dict(t='tiny', s='small', m='medium', b='base', l='large')  # as in mmpretrain


def resolve_arch(arch: str | Mapping, zoo: Mapping[str, dict], keys: Iterable[str]) -> dict:
    """Look an architecture up in a zoo, or check a user's own.

    Args:
        arch: A name in the zoo, or a mapping with exactly ``keys``.
        zoo: Named architectures.
        keys: What a mapping must hold.

    Raises:
        ValueError: An unknown name, or a mapping that lacks a key or has another.
        TypeError: Neither a name nor a mapping.
    """
    if isinstance(arch, str):
        arch = SHORT_NAMES.get(arch, arch)
        if arch not in zoo:
            raise ValueError(f'arch is {arch!r}; known are {sorted(zoo)}, or a dict')
        return dict(zoo[arch])
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    if set(arch) != set(keys):
        raise ValueError(f'an arch dict has the keys {sorted(keys)}, got {sorted(arch)}')
    return dict(arch)


def check_out_indices(out_indices: int | Iterable[int], num_stages: int) -> tuple[int, ...]:
    """Rising indices of stages in ``[0, num_stages)``; negative ones count from the end.

    Raises:
        ValueError: Empty, repeated, unordered or out of range.
    """
    given = as_tuple(out_indices)
    indices = tuple(i + num_stages if i < 0 else i for i in given)
    rising = all(a < b for a, b in zip(indices, indices[1:], strict=False))
    if not indices or not rising or not all(0 <= i < num_stages for i in indices):
        raise ValueError(
            f'out_indices must be rising indices from 0 to {num_stages - 1}, got {given}'
        )
    return indices


def check_out_type(
    out_type: str,
    allowed: Iterable[str],
    out_indices: tuple[int, ...],
    last: int,
    cls_token: bool = False,
) -> None:
    """Refuse unknown output types, and vectors of anything but the last stage.

    Raises:
        ValueError: ``out_type`` is not allowed, or is neither ``'map'`` nor ``'tokens'`` while
            ``out_indices`` is not ``(last,)``, or is a class token without ``cls_token``.
    """
    allowed = tuple(allowed)
    if out_type not in allowed:
        raise ValueError(f'out_type must be one of {allowed}, got {out_type!r}')
    if out_type not in ('map', 'tokens') and out_indices != (last,):
        raise ValueError(
            f'out_type={out_type!r} is of the last stage, out_indices=({last},); got {out_indices}'
        )
    if out_type == 'cls_token' and not cls_token:
        raise ValueError("out_type='cls_token' needs cls_token=True")
