"""A hook that draws the tokens of images while a model is validated or tested."""

import copy

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner

from ..arguments import KnownArguments
from ..registry import HOOKS
from .token_loss_hook import unwrapped


@HOOKS.register_module()
class TokenMapHook(Hook, metaclass=KnownArguments):
    """Draws the tokens of the first images of validations and tests.

    In a config::

        default_hooks = dict(
            token_maps=dict(type='mmtoken.TokenMapHook', num_images=4, interval=1)
        )

    The key is free. The pictures are those of ``tools/analysis/token_maps.py``. They go to the
    visualizer of the runner as ``val_tokens_0``, ``val_tokens_1`` and so on (``test_tokens_0`` in
    tests) with the number of training iterations as step, so that every backend has them: files in
    ``vis_data/vis_image``, TensorBoard, Weights & Biases.

    Each picture costs two more passes of backbone and neck, one of which counts
    multiply-accumulates. An image passes alone, as in a batch of one; of test-time augmentation the
    first view is drawn. Results do not change. In distributed runs the first process draws the
    first of its own images.

    Args:
        num_images: Images that are drawn in a validation or test.
        interval: Validations from one with pictures to the next; the first has them, and every
            test.
        per_block: For DGE a panel for each block instead of each stage.
        dpi: Dots per inch; a panel has an area of 16 square inches.

    Raises:
        ValueError: ``num_images``, ``interval`` or ``dpi`` below 1.
    """

    def __init__(
        self, num_images: int = 4, interval: int = 1, per_block: bool = False, dpi: int = 100
    ) -> None:
        for name, value in dict(num_images=num_images, interval=interval, dpi=dpi).items():
            if value < 1:
                raise ValueError(f'{name} must be 1 or more, got {value}')
        self.num_images = num_images
        self.interval = interval
        self.per_block = per_block
        self.dpi = dpi
        self.validations = 0
        self.drawn = num_images  # in this validation or test

    def before_run(self, runner: Runner) -> None:
        """Check the model.

        Raises:
            TypeError: Its class has no ``extract_feat``.
        """
        model = evaluated(runner)
        if not callable(getattr(model, 'extract_feat', None)):
            raise TypeError(
                f'{type(self).__name__} needs a model with a method `extract_feat`, such as a '
                f'detector, segmentor or classifier, which {type(model).__name__} lacks'
            )

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin with the first image, in every ``interval``-th validation."""
        self.drawn = self.num_images if self.validations % self.interval else 0
        self.validations += 1

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin with the first image."""
        self.drawn = 0

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: list | None = None,
        mode: str = 'train',
    ) -> None:
        """After an iteration of a validation or test: draw its images, until there are enough."""
        if mode == 'train' or not is_main_process():
            return
        if isinstance(unwrapped(runner.model), BaseTTAModel):
            data_batch = {key: views[0] for key, views in data_batch.items()}
        for i in range(len(data_batch['inputs'])):
            if self.drawn >= self.num_images:
                return
            # A copy, since preprocessing notes sizes in the data samples
            image = copy.deepcopy({key: value[i : i + 1] for key, value in data_batch.items()})
            self.draw(runner, image, f'{mode}_tokens_{self.drawn}')
            self.drawn += 1

    def draw(self, runner: Runner, batch: dict, name: str) -> None:
        """Draw a batch of one image; a model without tokens of its own is reported instead."""
        from ..visualization.token_maps import draw_image, to_pixels  # which load matplotlib

        try:
            figure, _ = draw_image(evaluated(runner), batch, self.per_block)
        except ValueError as error:
            self.drawn = self.num_images
            runner.logger.warning(f'{type(self).__name__} draws nothing: {error}')
            return
        runner.visualizer.add_image(name, to_pixels(figure, self.dpi), runner.iter)


def evaluated(runner: Runner):
    """The model inside wrappers and test-time augmentation."""
    model = unwrapped(runner.model)
    return model.module if isinstance(model, BaseTTAModel) else model
