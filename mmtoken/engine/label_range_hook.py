"""A hook that names label maps with classes that a segmentor does not have."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..arguments import KnownArguments
from ..registry import HOOKS
from .sample_labels import IGNORED
from .token_loss_hook import unwrapped


@HOOKS.register_module()
class LabelRangeHook(Hook, metaclass=KnownArguments):
    """Ends a training of mmseg at the first label that is no class, with the name of its file.

    Otherwise the loss fails without it: on a CPU by an index that is out of range, on a GPU by an
    assertion of the device. In a config::

        default_hooks = dict(label_range=dict(type='mmtoken.LabelRangeHook'))

    The key is free. Labels are looked at after augmentation, before they go to the device; it costs
    one pass over them. 255 is ignored, as in mmseg.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the model.

        Raises:
            TypeError: It is no segmentor, with a number of classes.
        """
        model = unwrapped(runner.model)
        if not isinstance(getattr(model, 'num_classes', None), int):
            raise TypeError(
                f'{type(self).__name__} needs a segmentor of mmseg, which has num_classes, got '
                f'{type(model).__name__}'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Look at the labels of a batch.

        Raises:
            ValueError: One is no class; the message has its file.
        """
        num_classes = unwrapped(runner.model).num_classes
        for sample in data_batch['data_samples']:
            labels = sample.gt_sem_seg.data
            wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)]
            if wrong.numel():
                raise ValueError(
                    f'{sample.metainfo.get("seg_map_path")} has the labels '
                    f'{wrong.unique()[:8].tolist()} (as they are after the pipeline), but the '
                    f'model has {num_classes} classes, from 0, and {IGNORED} is ignored'
                )
