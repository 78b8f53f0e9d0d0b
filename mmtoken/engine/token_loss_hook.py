"""What backbones of ours get from MMEngine's runner: their losses trained, sizes of images told."""

from types import MethodType

from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..registry import HOOKS
from ..runtime.aux_losses import token_losses
from .image_sizes import follow_image_sizes

_heard_any = False  # whether a model under this hook has published anything yet


@HOOKS.register_module()
class TokenLossHook(Hook):
    """Adds what backbones publish to what ``model.loss()`` returns, during training.

    To all that follows (mixed precision, accumulation, distributed training, logging) these are
    ordinary losses. In a config::

        default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook'))

    The name is free. MMEngine merges this dict with that of a base config, while a list
    ``custom_hooks`` takes the place of the base's: RTMDet would train without its moving average.

    In training, validation and test, backbones also learn from data samples how large each image
    is without the padding of its batch, see :func:`mmtoken.follow_image_sizes`.

    The priority is of no consequence: other hooks see the model outside of ``loss``, and a copy
    that one of them makes (``EMAHook``) has a ``loss`` of its own.
    """

    def __init__(self) -> None:
        self._checked = False

    def before_train(self, runner: Runner) -> None:
        """Wrap ``loss`` of the model, and let it follow the sizes of images.

        Raises:
            TypeError: The model's class has no ``loss``.
            RuntimeError: The model already has another ``loss`` than its class.
        """
        global _heard_any
        model = _unwrapped(runner.model)
        name = type(model).__name__
        if not callable(getattr(type(model), 'loss', None)):
            raise TypeError(f'TokenLossHook needs a model with a method `loss`, which {name} lacks')
        if 'loss' in vars(model) and not _is_wrapped(model):
            raise RuntimeError(
                f'TokenLossHook would replace {model.loss!r}, which something else has set as '
                f'`loss` of this {name}; remove one of the two'
            )
        # A bound method, which a deep copy of the model binds to the copy.
        model.loss = MethodType(_loss_with_tokens, model)
        self._checked = _heard_any = False
        _follow(model)

    def before_val(self, runner: Runner) -> None:
        """Let the model follow the sizes of images."""
        _follow(runner.model)

    def before_test(self, runner: Runner) -> None:
        """Let the model follow the sizes of images."""
        _follow(runner.model)

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """After the first iteration, say so if the hook is of no use."""
        if not (self._checked or _heard_any):
            runner.logger.warning(
                'TokenLossHook found nothing to do: no module published a loss or a statistic in '
                'the first training iteration'
            )
        self._checked = True

    def after_train(self, runner: Runner) -> None:
        """Give the model its own ``loss`` back."""
        model = _unwrapped(runner.model)
        if _is_wrapped(model):
            del model.loss


def _loss_with_tokens(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    """``loss()`` of the model's class, and what was published meanwhile.

    Raises:
        ValueError: Both have values of the same name.
    """
    global _heard_any
    with token_losses() as published:
        losses = type(model).loss(model, *args, **kwargs)
    _heard_any = _heard_any or len(published) > 0
    twice = sorted(losses.keys() & published.keys())
    if twice:
        raise ValueError(
            f'{", ".join(twice)}: both {type(model).__name__}.loss() and a module inside give this'
        )
    return {**losses, **published}


def _follow(model: nn.Module) -> None:
    """Follow the sizes of images where the model is MMEngine's, which a runner does not demand."""
    if any(isinstance(module, BaseModel) for module in model.modules()):
        follow_image_sizes(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model):
        model = model.module
    return model


def _is_wrapped(model: nn.Module) -> bool:
    """Whether ``loss`` is that of this hook, perhaps left over from a training that failed."""
    return getattr(vars(model).get('loss'), '__func__', None) is _loss_with_tokens
