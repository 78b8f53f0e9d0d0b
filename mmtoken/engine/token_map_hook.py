"""A hook that draws what a network does with its tokens, during validation and test."""

from collections.abc import Mapping

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from .token_loss_hook import unwrapped


@HOOKS.register_module()
class TokenMapHook(Hook):
    """Shows the granularity of tokens over the first images of validation and test.

    Pictures go to MMEngine's visualizer, and so to all of its backends: files, TensorBoard, W&B.
    In a config::

        default_hooks = dict(token_maps=dict(type='mmtoken.TokenMapHook', num_images=4))

    They are those of ``tools/analysis/token_maps.py``: a panel for each stage, or the borders of
    all tokens for a network that chooses once. Images come from the dataloader of validation or
    test; backbone and neck run on them once more, so predictions and scores stay as they are. In
    distributed runs the first process draws. With test-time augmentation nothing is drawn.

    Args:
        num_images: How many of each data set are drawn.
        interval: Draw in each ``interval``-th validation; a test is always drawn.
        per_block: A panel for each block instead of each stage.

    Raises:
        ValueError: ``num_images`` or ``interval`` is below 1; when something is to be drawn, a
            model of which no part chooses its tokens.
    """

    priority = 'LOW'

    def __init__(self, num_images: int = 4, interval: int = 1, per_block: bool = False) -> None:
        for name, value in (('num_images', num_images), ('interval', interval)):
            if value < 1:
                raise ValueError(f'{name} must be 1 or more, got {value}')
        self.num_images = num_images
        self.interval = interval
        self.per_block = per_block
        self.validations = 0
        self.left = 0  # images that are still to be drawn

    def before_val_epoch(self, runner: Runner) -> None:
        """Count validations."""
        self.left = 0 if self.validations % self.interval else self.num_images
        self.validations += 1

    def before_test_epoch(self, runner: Runner) -> None:
        """Draw in each test."""
        self.left = self.num_images

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs=None
    ) -> None:
        """Draw the images of a batch."""
        self.draw(runner, data_batch, 'val_tokens')

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs=None
    ) -> None:
        """Draw the images of a batch."""
        self.draw(runner, data_batch, 'test_tokens')

    @master_only
    def draw(self, runner: Runner, batch: Mapping | None, name: str) -> None:
        """Add pictures of as many images as are left to the visualizer."""
        if not self.left or not batch or isinstance(batch['inputs'][0], (list, tuple)):
            return
        # matplotlib is loaded when there is something to draw
        from ..analysis.recording import record_batch, to_picture
        from ..visualization.token_maps import draw_blocks, draw_stages, draw_tokens, to_pixels

        model = unwrapped(runner.model)
        few = {key: value[: self.left] for key, value in batch.items()}
        images, _, decisions = record_batch(model, few)
        if not decisions:
            raise ValueError(
                f'mmtoken.TokenMapHook: no part of this {type(model).__name__} chooses its tokens, '
                'as DGE and MSViT do; leave the hook out'
            )
        for i in range(len(images)):
            picture = to_picture(images[i], model.data_preprocessor)
            if decisions[0].per_network:
                figure = draw_tokens(picture, *decisions, image=i)
            else:
                figure = (draw_blocks if self.per_block else draw_stages)(picture, decisions, i)
            number = self.num_images - self.left
            runner.visualizer.add_image(f'{name}_{number}', to_pixels(figure), runner.iter)
            self.left -= 1
