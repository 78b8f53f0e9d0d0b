"""Base class of all backbones, and checks of their arguments."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar

import torch.nn as nn
from timm.layers import trunc_normal_
from timm.models import FeatureInfo
from torch import Tensor

from ..arguments import as_tuple, is_count
from ..checkpoints.module import CheckpointedBackbone
from ..layers.common.utils import init_own

MAX_STAGES = 10  # of a hierarchical architecture


class TokenBackbone(CheckpointedBackbone):
    """Freezing, initialization and layer depths of a backbone: a stem, then stages in a row.

    A stage is what ``out_indices`` and ``frozen_stages`` count: in a hierarchical backbone a module
    with a flat list ``blocks``, in a plain ViT a single block. Stages behind the last of
    ``out_indices`` are not built, since nothing would use them.

    Args:
        channels: Of the map of each stage of the architecture.
        strides: Of the same, in pixels of the image.
        out_indices: Stages whose maps are returned, in rising order, or one; negative ones count
            from the end.
        frozen_stages: Stages kept fixed, counted from the stem: 0 freezes the stem, 1 the stem and
            the first stage, and so on; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialization config, for example
            ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.

    Raises:
        ValueError: ``out_indices`` or ``frozen_stages`` out of range.
    """

    arch_zoo: ClassVar[Mapping[str, dict]] = {}
    arch_keys: ClassVar[tuple[str, ...]] = ()
    arch_options: ClassVar[Mapping[str, Any]] = {}  # what an architecture may say, with defaults

    stem_names: ClassVar[tuple[str, ...]] = ('patch_embed',)  # what precedes the first block
    stages_name: ClassVar[str] = 'layers'  # the attribute that lists the stages
    twin_args: ClassVar[dict]  # constructor arguments that turn the class into its dense twin
    fixed_args: ClassVar[tuple[str, ...]] = ()  # arguments of a base class that it does not take
    ratio_name: ClassVar[str | None] = None  # which ratio routing_override sets, if any
    ignorable_keys: str | None = None  # checkpoint keys that are ignored (regular expression)
    newly_initialized_keys: str | None = None  # keys that a checkpoint may lack

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        out_indices: Iterable[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_stages = num_stages = len(channels)
        self.out_indices = check_out_indices(out_indices, num_stages)
        self.feature_info = FeatureInfo(
            [
                dict(num_chs=width, reduction=stride, module=f'{self.stages_name}.{i}')
                for i, (width, stride) in enumerate(zip(channels, strides, strict=True))
            ],
            self.out_indices,
        )
        if not isinstance(frozen_stages, Integral) or not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages must be from -1 to {num_stages}, got {frozen_stages!r}'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Of each map that is returned; ``feature_info`` has the strides too, as timm's models."""
        return tuple(self.feature_info.channels())

    @property
    def num_built(self) -> int:
        """Stages that are built: up to the last whose map is returned."""
        return self.out_indices[-1] + 1

    @property
    def unbuilt_keys(self) -> str:
        """Names of what a checkpoint may have behind the last stage (regular expression)."""
        return rf'{self.stages_name}\.({"|".join(map(str, range(self.num_built, MAX_STAGES)))})\..*'

    @classmethod
    def full_arch(cls, arch: str | Mapping) -> dict:
        """An architecture with all that the class lets it say, see :func:`resolve_arch`."""
        return resolve_arch(arch, cls.arch_zoo, cls.arch_keys, cls.arch_options)

    @classmethod
    def short_arch(cls, arch: str | Mapping) -> str | dict:
        """Its name in the zoo, or else what differs from the defaults of ``arch_options``."""
        arch = cls.full_arch(arch)
        for name in cls.arch_zoo:
            if cls.full_arch(name) == arch:
                return name
        options = cls.arch_options
        return {k: v for k, v in arch.items() if k not in options or v != options[k]}

    @classmethod
    def library_baseline(cls, args: Mapping) -> dict | None:
        """Config of an OpenMMLab backbone of the same widths, depths and outputs.

        Args:
            args: All constructor arguments, defaults included; ``arch`` is a mapping.

        Returns:
            Its arguments and, as ``type``, its names in order of preference; None if no library
            has such a backbone.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, C_i, H_i, W_i)`` per index in ``out_indices``."""

    def init_fresh(self) -> None:
        """Truncated-normal Linear layers, then whatever ``init_cfg`` says.

        A layer's own ``init_weights`` runs last; a checkpoint is loaded after it.
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
        """Norm applied to a stage's output."""
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


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SHORT_NAMES = dict(t='tiny', s='small', m='medium', b='base', l='large')  # as in mmpretrain


def resolve_arch(
    arch: str | Mapping,
    zoo: Mapping[str, dict],
    keys: Iterable[str],
    optional: Mapping[str, Any] = MappingProxyType({}),
) -> dict:
    """Look an architecture up in a zoo, or check a user's own.

    Args:
        arch: A name in the zoo, or a mapping.
        zoo: Named architectures.
        keys: What a mapping must hold.
        optional: What it may hold as well, with default values.

    Raises:
        ValueError: An unknown name, or a mapping that lacks a key or has another.
        TypeError: Neither a name nor a mapping.
    """
    if isinstance(arch, str):
        arch = SHORT_NAMES.get(arch, arch)
        if arch not in zoo:
            raise ValueError(f'arch is {arch!r}; known are {sorted(zoo)}, or a dict')
        return {**optional, **zoo[arch]}
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    if set(arch) - set(optional) != set(keys):
        allowed = f'{sorted(keys)}' + f' and may have {sorted(optional)}' * bool(optional)
        raise ValueError(f'an arch dict has the keys {allowed}, got {sorted(arch)}')
    if zoo:
        _check_numbers(arch, next(iter(zoo.values())))
    return {**optional, **arch}


def _check_numbers(arch: Mapping, example: Mapping) -> None:
    """Refuse numbers below 1, and one number where an example has several.

    Raises:
        ValueError: The message has the example.
    """
    for name, value in arch.items():
        usual = example.get(name)
        if isinstance(usual, int) and not is_count(value):
            raise ValueError(
                f"arch['{name}'] must be a whole number of 1 or more, such as {usual}, "
                f'got {value!r}'
            )
        if isinstance(usual, tuple) and not _are_counts(value):
            raise ValueError(
                f"arch['{name}'] must be whole numbers of 1 or more, such as {usual}, got {value!r}"
            )


def _are_counts(values: Any) -> bool:
    return isinstance(values, Sequence) and all(map(is_count, values))


def check_out_indices(out_indices: int | Iterable[int], num_stages: int) -> tuple[int, ...]:
    """Rising indices of stages in ``[0, num_stages)``; negative ones count from the end.

    Raises:
        ValueError: Empty, repeated, unordered or out of range.
    """
    given = as_tuple(out_indices)
    indices = ()
    if all(isinstance(i, Integral) for i in given):
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
