"""A hook by which the dense twin of a model teaches it."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import weights_to_cpu
from torch import Tensor, nn

from ..analysis.twin import dense_twin, mappings
from ..checkpoints.fit import adopt_grids, fit, grids_of
from ..checkpoints.load import load_into
from ..checkpoints.report import Report, shorten
from ..layers.common.padding import sizes_on_map
from ..losses.map_distance import DISTANCES, map_distance
from ..losses.rate import check_open_interval
from ..registry import HOOKS
from ..runtime.aux_losses import is_collecting, publish
from .token_loss_hook import TokenLossHook, unwrapped

Source = Literal['backbone', 'neck']
LOSS = 'loss_twin_distill'
SAVED = 'twin_teacher'  # its key in a checkpoint of the runner


@HOOKS.register_module()
class TwinDistillHook(TokenLossHook):
    """Lets the dense twin of a detector or segmentor teach it, during training.

    For every batch the dense twin of the backbone (or of backbone and neck) computes its maps too,
    and the distance of the student's maps to them is added to the losses as ``loss_twin_distill``.
    In a config::

        default_hooks = dict(
            twin=dict(type='mmtoken.TwinDistillHook', checkpoint='dense.pth', loss_weight=1.0)
        )

    The teacher is built from the model's config by :func:`mmtoken.dense_twin`. Its weights are

    * those of ``checkpoint``, or
    * without it, those that the student has when training starts, so that a student with pretrained
      weights is taught by the pretrained dense network. The student must have all of them: DGE,
      MSViT and MPM have, while STViT-R, STViT, PSViT and SWAT lack some and need a ``checkpoint``.
      With ``ema`` the teacher then follows the student after each iteration:
      ``teacher = (1 - ema) * teacher + ema * student``; buffers are the student's. Checkpoints of
      the training keep such a teacher, with or without ``ema``, and resuming goes on with it.

    It is in eval mode, has no gradient, and is no part of the model: neither its ``state_dict`` nor
    the optimizer nor distributed training see it. It computes under the autocast of the student;
    the distance is float32. The student's maps are those that it computes in ``loss()`` anyway; if
    it computes several, the loss is their mean. Padding of the batch does not count where data
    samples tell the sizes of images (:func:`mmtoken.follow_image_sizes`).

    The hook does what :class:`mmtoken.TokenLossHook` does as well; the two may stand together, in
    any order.

    Args:
        checkpoint: File or URL: a checkpoint of the dense model or, for ``source='backbone'``,
            weights of the backbone alone, as :func:`mmtoken.checkpoints.load_into` takes them.
        ema: Momentum, above 0 and below 1, as in MMEngine: the weight of the student, a small
            number such as 0.001. None for a teacher that does not change.
        source: Which maps are compared, ``'backbone'`` or ``'neck'``. A backbone with
            ``out_type='tokens'`` returns none: take ``'neck'``. Without ``checkpoint`` the
            teacher's neck is the student's first one, which should be a trained one (``load_from``)
            or be followed (``ema``).
        distance: ``'mse'`` for the mean squared difference of features that are normalized over
            their channels, ``'cosine'`` for one minus their cosine similarity. It is averaged over
            positions, then over maps.
        loss_weight: Factor of the loss.

    Raises:
        ValueError: Bad argument values, or both ``checkpoint`` and ``ema``.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | None = None,
        ema: float | None = None,
        source: Source = 'backbone',
        distance: str = 'mse',
        loss_weight: float = 1.0,
    ) -> None:
        if checkpoint is not None and ema is not None:
            raise ValueError(
                f'either checkpoint or ema: a teacher from checkpoint={checkpoint!r} does not '
                f'change, while with ema={ema} it starts from the student and follows it'
            )
        if ema is not None:
            check_open_interval(ema=ema)
        if source not in get_args(Source):
            raise ValueError(f'source must be one of {get_args(Source)}, got {source!r}')
        if distance not in DISTANCES:
            raise ValueError(f'distance must be one of {tuple(DISTANCES)}, got {distance!r}')
        if not loss_weight >= 0:
            raise ValueError(f'loss_weight must be 0 or more, got {loss_weight}')
        self.checkpoint = checkpoint
        self.ema = ema
        self.source = source
        self.distance = distance
        self.loss_weight = loss_weight
        self._teaching: _Teaching | None = None
        self._saved: dict[str, Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the teacher and watch the student's modules.

        Raises:
            OSError, ValueError: The checkpoint does not exist or does not fit, or the student lacks
                weights of its twin, or nothing in the model's config has a dense twin.
            TypeError: The model has no backbone of its own, no such neck, or no ``loss``.
            RuntimeError: The runner has several such hooks or no config of the model; or it resumes
                a training whose checkpoint has no teacher.
        """
        if sum(isinstance(hook, TwinDistillHook) for hook in runner.hooks) > 1:
            raise RuntimeError('a training takes one TwinDistillHook, the runner has several')
        model = unwrapped(runner.model)
        parts = ('backbone', 'neck')[: 1 + (self.source == 'neck')]
        teacher = _build_twin(_config_of(runner, model, parts), parts)
        if self.checkpoint is None:
            _start_as(teacher, model)
            if runner.iter > 0:
                self._resume(teacher)
        else:
            for name, part in teacher.named_children():
                load_into(part, self.checkpoint, 'neck.' if name == 'neck' else None)
        self._saved = None
        teacher.to(next(model.parameters()).device)

        super().before_train(runner)
        _end_other_teaching(model)
        self._teaching = _Teaching(teacher, self.distance, self.loss_weight)
        self._teaching.start(model.backbone, getattr(model, self.source))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Let the teacher follow the student.

        Raises:
            RuntimeError: The losses of this iteration lack that of the teacher.
        """
        model = unwrapped(runner.model)
        if not isinstance(outputs, Mapping) or LOSS not in outputs:
            raise RuntimeError(
                f'{type(model).__name__} was not taught: its training did not call the '
                f'{self.source} with gradients inside of its method `loss`'
            )
        if self.ema is not None:
            _follow_student(self._teaching.teacher, model, self.ema)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was before the training."""
        if self._teaching is not None:
            self._teaching.end()
            self._teaching = None
        super().after_train(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep a teacher that no file has."""
        if self.checkpoint is None and self._teaching is not None:
            checkpoint[SAVED] = weights_to_cpu(self._teaching.teacher.state_dict())

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the teacher of a checkpoint, in case that training resumes from it."""
        if self.checkpoint is None:
            self._saved = checkpoint.get(SAVED)

    def _resume(self, teacher: nn.Module) -> None:
        if self._saved is None:
            raise RuntimeError(
                'TwinDistillHook cannot resume: the checkpoint has no teacher, as it is of a '
                'training without this hook, or with checkpoint=...; start a new training from it '
                'by load_from, or give the teacher by checkpoint=...'
            )
        teacher.load_state_dict(self._saved)


class _Teaching:
    """A teacher, and the hooks by which it sees a student's images and maps.

    Copies of the student, made during training, share it; they are not taught after it.
    """

    def __init__(self, teacher: nn.Module, distance: str, loss_weight: float) -> None:
        self.teacher: nn.Module | None = teacher
        self.distance = distance
        self.loss_weight = loss_weight
        self.images: Tensor | None = None
        self.handles: list = []

    def start(self, backbone: nn.Module, source: nn.Module) -> None:
        self.handles = [
            backbone.register_forward_pre_hook(self.see_images, with_kwargs=True),
            source.register_forward_hook(self.compare),
        ]

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.teacher, self.images = [], None, None

    def see_images(self, backbone: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.teacher is not None and is_collecting():
            self.images = next(iter((*args, *kwargs.values())))

    @torch.compiler.disable
    def compare(self, source: nn.Module, args: tuple, maps: Any) -> None:
        """Publish the distance of the maps of a module to the teacher's."""
        if self.teacher is None or not is_collecting():
            return
        with torch.no_grad():
            wanted = _as_maps(self.teacher(self.images), 'the dense twin')
        maps = _as_maps(maps, type(source).__name__)
        shapes, twin_shapes = ([tuple(m.shape) for m in each] for each in (maps, wanted))
        if shapes != twin_shapes:
            raise ValueError(
                f'{type(source).__name__} returns maps of the shapes {shapes}, but its dense twin '
                f'of the shapes {twin_shapes}'
            )
        distances = [
            map_distance(own, other, sizes_on_map(self.images, own), self.distance)
            for own, other in zip(maps, wanted, strict=True)
        ]
        publish({LOSS: self.loss_weight * torch.stack(distances).mean()})

    def __deepcopy__(self, memo: dict) -> '_Teaching':
        return self


def _as_maps(output: Any, owner: str) -> Sequence[Tensor]:
    """The maps ``(B, C, H, W)`` that a module returned; TypeError for anything else."""
    maps = [output] if isinstance(output, Tensor) else output
    if isinstance(maps, Sequence) and all(isinstance(m, Tensor) and m.ndim == 4 for m in maps):
        return maps
    items = maps if isinstance(maps, Sequence) else [maps]
    given = [f'{tuple(m.shape)}' if isinstance(m, Tensor) else type(m).__name__ for m in items]
    raise TypeError(
        f'TwinDistillHook compares maps (B, C, H, W), but {owner} returns {", ".join(given)}; '
        "of a backbone with out_type='tokens' compare the maps behind the neck: source='neck'"
    )


def _config_of(runner: Runner, model: nn.Module, parts: Sequence[str]) -> Mapping:
    """The config of the model, if it and the model have these parts.

    Raises:
        TypeError: They do not.
        RuntimeError: The runner has no config of the model.
    """
    cfg = runner.cfg.get('model')
    if not isinstance(cfg, Mapping):
        raise RuntimeError(
            'TwinDistillHook builds the dense twin from runner.cfg.model, which this runner does '
            'not have; make it by Runner.from_cfg(cfg), or give it cfg=dict(model=...)'
        )
    name = type(model).__name__
    owners = [part for part in mappings(cfg) if isinstance(part.get('backbone'), Mapping)]
    if len(owners) != 1 or owners[0] is not cfg:
        raise TypeError(
            f'TwinDistillHook needs a model with one backbone of its own; the config of {name} '
            f'has {len(owners)} backbones, inside of {[str(o.get("type")) for o in owners]}. '
            'Semi-supervised detectors have a teacher already'
        )
    for part in parts:
        if not isinstance(getattr(model, part, None), nn.Module) or not cfg.get(part):
            raise TypeError(f'TwinDistillHook compares maps of the {part}, which {name} lacks')
    return cfg


def _end_other_teaching(model: nn.Module) -> None:
    """End what a training that failed has left."""
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            teaching = getattr(hook, '__self__', None)
            if isinstance(teaching, _Teaching):
                teaching.end()


def _build_twin(cfg: Mapping, parts: Sequence[str]) -> nn.Sequential:
    """The dense twins of parts of a model, by their names, in eval mode and without gradient."""
    twin = dense_twin(cfg)
    with torch.random.fork_rng(devices=[]):  # the student draws the same numbers without a teacher
        modules = OrderedDict((part, MODELS.build(twin[part])) for part in parts)
    return nn.Sequential(modules).requires_grad_(False).eval()


def _weights_of(student: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """The student's weights, by the names of its dense twin.

    Raises:
        ValueError: It lacks some, or has them in another shape.
    """
    own, weights = twin.state_dict(), student.state_dict()
    # Joins queries with keys and values, which some sparse blocks have apart.
    weights = fit(weights, twin, Report(mapped={name: name for name in weights}))
    missing = [n for n in own if n not in weights or weights[n].shape != own[n].shape]
    if missing:
        raise ValueError(
            f'{type(student).__name__} lacks {len(missing)} of the {len(own)} weights of its dense '
            f'twin: {", ".join(shorten(missing))}; give those of a dense network by '
            'TwinDistillHook(checkpoint=...)'
        )
    return {name: weights[name] for name in own}


def _start_as(teacher: nn.Module, model: nn.Module) -> None:
    """Give the teacher the student's weights."""
    for name, twin in teacher.named_children():
        student = getattr(model, name)
        grids = grids_of(student)
        adopt_grids(twin, {n: grid for n, grid in grids.items() if n in grids_of(twin)})
        twin.load_state_dict(_weights_of(student, twin))


@torch.no_grad()
def _follow_student(teacher: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's; take its buffers."""
    for name, twin in teacher.named_children():
        weights = _weights_of(getattr(model, name), twin)
        for key, parameter in twin.named_parameters():
            parameter.lerp_(weights[key], momentum)
        for key, buffer in twin.named_buffers():
            if key in weights:  # not those that are computed
                buffer.copy_(weights[key])
