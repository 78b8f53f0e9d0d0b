"""From the config and the checkpoint of a dense model to those of a sparse one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..analysis.configs import load_config
from ..checkpoints import Report, find_weights, fit_to, read_checkpoint
from ..checkpoints.convert import keep_outside
from ..files import replacing
from ..registry import MODELS
from .methods import sparse_backbone
from .plain import Args, describe

# Methods whose dense twin has weights that they lack, and so needs those of the dense model
FOREIGN_TWIN = ('stvit-r', 'stvit')
FINE_TUNING_LR = 0.1  # over the learning rate of the base


@dataclass(frozen=True)
class Sparsified:
    """What :func:`sparsify` wrote.

    Attributes:
        base: The config that was given.
        config: Path of the new config.
        checkpoint: Path of the weights of the whole model; None if none were given.
        backbone: Config of the sparse backbone.
        notes: What differs from the dense backbone, beside its tokens.
        report: What became of the weights; None without.
    """

    base: Config
    config: Path
    checkpoint: Path | None
    backbone: Args
    notes: list[str]
    report: Report | None


def sparsify(
    base: str,
    method: str,
    folder: Path,
    checkpoint: str | None = None,
    finetune: int | None = None,
) -> Sparsified:
    """Write a config that puts a sparse backbone in the place of a dense one, and its weights.

    Neck and heads stay, and so does everything else of the config, which is the base of the new
    one. The backbone has the same channels, strides and weights; parts that are new keep their
    initial values.

    Args:
        base: Config of mmdet, mmseg or mmpretrain with a Swin, PVT or plain ViT: a path, or as in
            ``'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'``.
        method: A key of :data:`~mmtoken.conversion.methods.METHODS`.
        folder: For the config and the weights, which are named after the base and the method.
        checkpoint: Path or URL of weights of the dense model.
        finetune: Epochs, or iterations where the base counts these, of a short schedule with a
            tenth of the learning rate, in which the dense model teaches the sparse one; None leaves
            the schedule as it is.

    Raises:
        OSError: A file is missing, or one that would be written exists.
        ValueError: The method does not fit the backbone, or the weights do not fit the model.
    """
    cfg = load_config(base)
    backbone = find_backbone(cfg)
    sparse, notes = sparse_backbone(describe(backbone, cfg.default_scope), method)
    stem = f'{Path(base.rpartition("::")[2]).stem}_{method}'
    files = folder / f'{stem}.py', folder / f'{stem}.pth'
    for file in files[: 2 if checkpoint else 1]:
        if file.exists():
            raise FileExistsError(f'{file} exists')
    init_default_scope(cfg.default_scope)
    module = MODELS.build(dict(sparse))
    state = report = None
    if checkpoint is not None:
        state, report = fit_whole(module, checkpoint)
    elif weights := initial_weights(cfg):
        sparse['init_cfg'] = weights
    delta = make_delta(cfg, sparse, files[1] if checkpoint else None)
    if finetune is not None:
        delta |= fine_tuning(cfg, finetune, checkpoint if method in FOREIGN_TWIN else None)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(files[0]) as new:
        new.write_text(config_text(base, method, folder, delta))
    try:
        Config.fromfile(files[0])  # as tools will; bases in pure Python style cannot be built upon
    except Exception as error:
        files[0].unlink()
        raise ValueError(f'{base} cannot be the base of another config: {error}') from error
    if state is not None:
        with replacing(files[1]) as new:
            torch.save(dict(state_dict=state, meta=dict(sparsified=method)), new)
    return Sparsified(cfg, files[0], files[1] if checkpoint else None, sparse, notes, report)


def find_backbone(cfg: Config) -> Mapping:
    """The config of the backbone of a model.

    Raises:
        ValueError: The model has none.
    """
    backbone = (cfg.get('model') or {}).get('backbone')
    if not backbone:
        raise ValueError(f'{cfg.filename}: its model has no backbone')
    return backbone


def initial_weights(cfg: Config) -> Args | list[Args] | None:
    """``init_cfg`` of the dense backbone, also where its libraries allow other forms of it."""
    backbone = cfg.model.backbone
    if init_cfg := backbone.get('init_cfg'):
        if isinstance(init_cfg, Mapping):
            return dict(type='Pretrained') | dict(init_cfg)  # mmdet's PVT needs no type
        return [dict(entry) for entry in init_cfg]
    pretrained = backbone.get('pretrained') or cfg.model.get('pretrained')
    return dict(type='Pretrained', checkpoint=pretrained) if pretrained else None


def fit_whole(backbone: nn.Module, checkpoint: str) -> tuple[dict[str, Tensor], Report]:
    """Weights of a whole model with another backbone, and what became of those of the backbone."""
    weights = find_weights(read_checkpoint(checkpoint), checkpoint)
    state, report = fit_to(backbone, weights, checkpoint)
    return keep_outside(state, weights, report), report


def make_delta(cfg: Config, backbone: Args, checkpoint: Path | None) -> Args:
    """What the new config changes of its base."""
    model = dict(backbone=dict(_delete_=True, **backbone))
    if 'pretrained' in cfg.model:
        model['pretrained'] = None
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    delta = dict(
        custom_imports=dict(imports=[*imports, 'mmtoken'], allow_failed_imports=False),
        model=model,
    )
    if MODELS.get(backbone['type']).ratio_name:  # it chooses, with a loss on its choices
        delta['default_hooks'] = dict(token_losses=dict(type='mmtoken.TokenLossHook'))
    if checkpoint is not None:
        delta['load_from'] = str(checkpoint)
    return delta


def fine_tuning(cfg: Config, length: int, teacher: str | None) -> Args:
    """A short schedule, in which the dense twin teaches the backbone.

    Args:
        cfg: The base.
        length: Epochs, or iterations where the base counts these.
        teacher: Checkpoint of the dense model; None for a twin with the weights of the student.

    Raises:
        ValueError: The base has no schedule to shorten.
    """
    for key in ('train_cfg', 'optim_wrapper'):
        if not cfg.get(key):
            raise ValueError(f'{cfg.filename} has no {key}, so there is no schedule to shorten')
    by_epoch = 'max_epochs' in cfg.train_cfg
    hook = dict(type='mmtoken.TwinDistillHook', **(dict(checkpoint=teacher) if teacher else {}))
    schedule = dict(type='CosineAnnealingLR', T_max=length, by_epoch=by_epoch)
    if by_epoch:
        schedule['convert_to_iter_based'] = True
    return dict(
        default_hooks=dict(token_losses=hook),  # which does what TokenLossHook does
        train_cfg={'max_epochs' if by_epoch else 'max_iters': length, 'val_interval': length},
        param_scheduler=[schedule],
        optim_wrapper=dict(optimizer=dict(lr=FINE_TUNING_LR * cfg.optim_wrapper.optimizer.lr)),
    )


def config_text(base: str, method: str, folder: Path, delta: Args) -> str:
    """The file: a comment, the base, and what changes."""
    scope, separator, _ = base.partition('::')
    path = base if separator else os.path.relpath(base, folder)
    # On the onedl stack `mmseg::` resolves once mmtoken is imported, and `mmtoken::` does then.
    first = "__import__('mmtoken') and " if separator and scope != 'mmdet' else ''
    return (
        f'# {method} in the place of the dense backbone, written by: mmtoken sparsify\n'
        f'_base_ = {first}{path!r}\n\n{Config(delta).pretty_text}'
    )
