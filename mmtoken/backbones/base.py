"""What every backbone of the package has in common."""

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch.nn as nn
from mmengine.model import BaseModule
from timm.layers import trunc_normal_
from torch import Tensor

from ..checkpoints import load_into


class TokenBackbone(BaseModule, metaclass=ABCMeta):
    """Freezing, initialisation and layer depths of a staged backbone.

    A subclass has a stem ``patch_embed`` and stages ``layers``, each a module with a flat list
    ``blocks``, and hands out one dense map per index in ``out_indices``.

    Args:
        out_indices: Stages whose maps are returned, in rising order.
        frozen_stages: Stages kept fixed, counted from the stem: 0 freezes the stem, 1 the stem and
            the first stage, and so on; -1 freezes nothing.
        norm_eval: Keep batch norms in eval mode while training.
        init_cfg: MMEngine's initialisation config, for example
            ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``.
    """

    twin_args: ClassVar[dict]  # constructor arguments that turn the class into its dense twin
    unused_keys: str | None = None  # names a checkpoint may have in excess (regular expression)
    fresh_keys: str | None = None  # names it may lack

    def __init__(
        self,
        out_indices: Iterable[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, C_i, H_i, W_i)`` per index in ``out_indices``."""

    def init_weights(self) -> None:
        """Truncated-normal Linear layers, then whatever ``init_cfg`` says.

        Raises:
            ValueError: A ``Pretrained`` checkpoint that does not fit; see
                :func:`~mmtoken.checkpoints.load_into`.
        """
        if self.is_init:
            return
        self.apply(_init_linear)
        init_cfg = self.init_cfg
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            load_into(self, init_cfg['checkpoint'], init_cfg.get('prefix'))
            self.is_init = True
        else:
            super().init_weights()

    def train(self, mode: bool = True) -> 'TokenBackbone':
        """As in torch, but frozen stages and, with ``norm_eval``, batch norms stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
            module.requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def frozen_modules(self) -> list[nn.Module]:
        """The stem, stages and output norms that ``frozen_stages`` keeps fixed."""
        if self.frozen_stages < 0:
            return []
        frozen = [self.patch_embed]
        for i, stage in enumerate(self.layers[: self.frozen_stages]):
            frozen.append(stage)
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        return frozen

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of the layer a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: What precedes this backbone's own names, such as ``'backbone.'``.

        Returns:
            ``(depth, number of layers)``: 0 for the stem, then one per block; a downsampling layer
            counts with the block before it, output norms and all else come last.
        """
        depths = [len(stage.blocks) for stage in self.layers]
        num_layers = sum(depths) + 2
        last = num_layers - 1
        if not param_name.startswith(prefix):
            return last, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] == 'patch_embed':
            return 0, num_layers
        if parts[0] != 'layers':
            return last, num_layers
        stage = int(parts[1])
        block = int(parts[3]) + 1 if parts[2] == 'blocks' else depths[stage]
        return sum(depths[:stage]) + block, num_layers


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
        if arch not in zoo:
            raise ValueError(f'arch is {arch!r}; known are {sorted(zoo)}, or a dict')
        return dict(zoo[arch])
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    if set(arch) != set(keys):
        raise ValueError(f'an arch dict has the keys {sorted(keys)}, got {sorted(arch)}')
    return dict(arch)


def check_out_indices(out_indices: Iterable[int], num_stages: int) -> tuple[int, ...]:
    """Rising stage indices in ``[0, num_stages)``; negative ones count from the end.

    Raises:
        ValueError: Empty, repeated, unordered or out of range.
    """
    given = tuple(out_indices)
    indices = tuple(i + num_stages if i < 0 else i for i in given)
    rising = all(a < b for a, b in zip(indices, indices[1:], strict=False))
    if not indices or not rising or not all(0 <= i < num_stages for i in indices):
        raise ValueError(
            f'out_indices must be rising stage indices from 0 to {num_stages - 1}, got {given}'
        )
    return indices
