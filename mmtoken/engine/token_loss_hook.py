"""A hook that trains the losses of backbones, and tells them the sizes of images."""

from types import MethodType

from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..arguments import KnownArguments
from ..registry import HOOKS
from ..runtime.aux_losses import token_losses
from .image_sizes import follow_image_sizes


@HOOKS.register_module()
class TokenLossHook(Hook, metaclass=KnownArguments):
    """Adds the losses that backbones publish to what ``model.loss()`` returns, during training.

    Mixed precision, accumulation, distributed training and logging then treat them as any loss. In
    a config::

        default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook'))

    The key is free. MMEngine merges this dict with that of a base config, while a list
    ``custom_hooks`` would replace the base's: RTMDet would train without its moving average.

    ``model.loss`` is wrapped because MMEngine passes losses from a model to the optimizer inside
    ``train_step``, where no hook is called, and our backbones serve models of any class.

    In training, validation and test, backbones also get the size of each image without the padding
    of its batch from the data samples, see :func:`mmtoken.follow_image_sizes`.

    The priority of the hook does not matter: other hooks call the model outside of ``loss``, and a
    copy of the model (``EMAHook``) has its own ``loss``.
    """

    def before_train(self, runner: Runner) -> None:
        """Wrap ``loss`` of the model, and follow the sizes of images.

        Raises:
            TypeError: The model's class has no ``loss``.
            RuntimeError: The model already has another ``loss`` than its class.
        """
        model = unwrapped(runner.model)
        hook, name = type(self).__name__, type(model).__name__
        if not callable(getattr(type(model), 'loss', None)):
            raise TypeError(f'{hook} needs a model with a method `loss`, which {name} lacks')
        if 'loss' in vars(model) and not _is_wrapped(model):
            raise RuntimeError(
                f'{hook} would replace {model.loss!r}, which something else has set as '
                f'`loss` of this {name}; remove one of the two'
            )
        # A bound method, which a deep copy of the model binds to the copy.
        model.loss = MethodType(_loss_with_tokens, model)
        _follow(model)

    def before_val(self, runner: Runner) -> None:
        """Follow the sizes of images."""
        _follow(runner.model)

    before_test = before_val

    def after_train(self, runner: Runner) -> None:
        """Give the model its own ``loss`` back."""
        model = unwrapped(runner.model)
        if _is_wrapped(model):
            del model.loss


def _loss_with_tokens(model: nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    """``loss()`` of the model's class, and what modules published during the call.

    Raises:
        ValueError: Both have values of the same name.
    """
    with token_losses() as published:
        losses = type(model).loss(model, *args, **kwargs)
    if twice := sorted(losses.keys() & published.keys()):
        raise ValueError(
            f'both {type(model).__name__}.loss() and a module inside it give {", ".join(twice)}'
        )
    return {**losses, **published}


def _follow(model: nn.Module) -> None:
    """Follow the sizes of images, if the model is MMEngine's; a runner takes any."""
    if any(isinstance(module, BaseModel) for module in model.modules()):
        follow_image_sizes(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers, such as that of distributed training."""
    while is_model_wrapper(model):
        model = model.module
    return model


def _is_wrapped(model: nn.Module) -> bool:
    """Whether ``loss`` is this hook's, perhaps from a training that failed."""
    return getattr(vars(model).get('loss'), '__func__', None) is _loss_with_tokens
