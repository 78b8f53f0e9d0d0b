"""Lower learning rates for earlier layers of a backbone."""

import inspect
from collections.abc import Mapping
from numbers import Real

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with lower learning rates for layers near the input.

    Layer-wise decay as in BEiT (arXiv 2106.08254) and ViTDet (arXiv 2203.16527): the learning rate
    of a parameter is multiplied by ``layer_decay_rate ** (num_layers - 1 - depth)``. Both numbers
    come from ``get_layer_depth(name, prefix)`` of the backbone, which all of ours and mmpretrain's
    have. Necks and heads keep their learning rate. In a config::

        optim_wrapper = dict(
            constructor='mmtoken.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(
                layer_decay_rate=0.75,
                norm_decay_mult=0.0,
                custom_keys=dict(pos_embed=dict(decay_mult=0.0), router=dict(lr_mult=10.0)),
            ),
        )

    Several modules may have depths; if one contains another, the outer one is asked. Parameters
    with equal settings share a group, in the order of the model's parameters; ``param_names`` of a
    group has their names. A table of the learning rates is logged.

    Args:
        optim_wrapper_cfg: As in MMEngine; ``optimizer`` must have ``lr``.
        paramwise_cfg: As in MMEngine, and ``layer_decay_rate``, in (0, 1].

    Raises:
        ValueError: ``layer_decay_rate`` is missing or out of range, or ``lr`` is missing. When
            called: two modules share a parameter without ``bypass_duplicate=True``.
        TypeError: When called: no module of the model has ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        # No default: mmdet and mmseg spell it `decay_rate`, and such a config would have no decay.
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg must have a layer_decay_rate above 0 and up to 1, got {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError('layer-wise decay needs `lr` in the config of the optimizer')

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """MMEngine's groups, one per parameter; when all are added, decayed and merged."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:  # the call for the whole model, not one of the recursive calls
            params[:] = self._decayed(params, module)

    def _decayed(self, groups: list[dict], model: nn.Module) -> list[dict]:
        layered = _layered_modules(model)
        rate = self.paramwise_cfg['layer_decay_rate']
        # A shared parameter has its first name, here and in the groups.
        names = {parameter: name for name, parameter in model.named_parameters()}
        merged: list[dict] = []
        rows: dict[tuple[str | None, int], tuple[list[int], set[float]]] = {}
        done = set()
        for group in groups:
            [parameter] = group['params']
            name = names[parameter]
            if parameter in done:
                # torch refuses it in two groups, and updates it twice in one.
                raise ValueError(
                    f'{name} is shared between modules; '
                    'set bypass_duplicate=True in paramwise_cfg if it should be'
                )
            done.add(parameter)
            start = next((start for start in layered if name.startswith(start)), None)
            depth, num_layers = 0, 1
            if start is not None:
                depth, num_layers = layered[start].get_layer_depth(name, prefix=start)
            lr = group.get('lr', self.base_lr) * rate ** (num_layers - 1 - depth)
            _merge(merged, {**group, 'lr': lr, 'param_names': [name]})

            sizes, lrs = rows.setdefault((start, depth), ([], set()))
            sizes.append(parameter.numel())
            lrs.add(float(lr))
        print_log(_table(rows, list(layered), rate), logger='current')
        return merged


def _layered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with ``get_layer_depth``, outer ones first, by the prefix of their parameters.

    Raises:
        TypeError: There is none.
    """
    found = {
        f'{name}.' if name else '': module
        for name, module in model.named_modules()
        if _gives_depths(module)
    }
    if not found:
        raise TypeError(
            'layer-wise decay needs a model with a backbone that has a method '
            f'`get_layer_depth(name, prefix)`; no module of this {type(model).__name__} has it'
        )
    return found


def _gives_depths(module: nn.Module) -> bool:
    # Of the class: a compiled module returns its original's method, which expects other names.
    # With a prefix: that of mmpretrain's classifiers only calls their backbone's.
    method = getattr(type(module), 'get_layer_depth', None)
    return method is not None and 'prefix' in inspect.signature(method).parameters


def _merge(groups: list[dict], new: dict) -> None:
    """Merge a group into the one with equal settings, or append it."""
    members = ('params', 'param_names')
    settings = {k: v for k, v in new.items() if k not in members}
    for group in groups:
        if {k: v for k, v in group.items() if k not in members} == settings:
            for key in members:
                group[key] += new[key]
            return
    groups.append(new)


def _table(rows: Mapping, starts: list[str], rate: float) -> str:
    """One line per layer: its parameters and learning rates, several with custom keys."""
    lines = [('layer', 'parameters', 'lr')]
    order = [*starts, None]
    for start, depth in sorted(rows, key=lambda row: (order.index(row[0]), row[1])):
        sizes, lrs = rows[start, depth]
        layer = 'all else' if start is None else f'{start.removesuffix(".")} {depth}'.lstrip()
        lines.append((layer, f'{sum(sizes):,}', ', '.join(f'{lr:.3g}' for lr in sorted(lrs))))
    width = max(len(layer) for layer, _, _ in lines)
    return '\n'.join(
        [f'Learning rates, each layer {rate:g} times the next:']
        + [f'  {layer:{width}}  {size:>12}  {lr}' for layer, size, lr in lines]
    )
