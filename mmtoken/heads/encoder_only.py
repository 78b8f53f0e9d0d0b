"""What the encoder-only heads of both libraries share."""

from collections.abc import Mapping, Sequence

from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor

from .query_decoder import QueryDecoder

NO_OBJECT_WEIGHT = 0.1  # of the class of queries without an object
# Those of Mask2Former, arXiv 2112.01527, which EoMT has, too
LOSS_CLS = dict(type='mmdet.CrossEntropyLoss', loss_weight=2.0, reduction='mean')
LOSS_MASK = dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, reduction='mean', loss_weight=5.0)
LOSS_DICE = dict(
    type='mmdet.DiceLoss', use_sigmoid=True, activate=True, reduction='mean', naive_dice=True,
    eps=1.0, loss_weight=5.0,
)  # fmt: skip
TRAIN_CFG = dict(
    num_points=12544,
    oversample_ratio=3.0,
    importance_sample_ratio=0.75,
    assigner=dict(
        type='mmdet.HungarianAssigner',
        match_costs=[
            dict(type='mmdet.ClassificationCost', weight=2.0),
            dict(type='mmdet.CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
            dict(type='mmdet.DiceCost', weight=5.0, pred_act=True, eps=1.0),
        ],
    ),
    sampler=dict(type='mmdet.MaskPseudoSampler'),
)


class EncoderOnly:
    """Mix-in for a ``Mask2FormerHead``: its losses and results, but queries of our decoder.

    Args:
        decoder: Arguments of :class:`~mmtoken.heads.query_decoder.QueryDecoder`, without
            ``num_classes``.
        num_things_classes, num_stuff_classes: Classes with and without instances.
        loss_cls, loss_mask, loss_dice: Configs of losses, by default those of Mask2Former.
        train_cfg: Changes of :data:`TRAIN_CFG`, with the keys of Mask2Former's.
        test_cfg: Accepted as all heads do.
        init_cfg: MMEngine's initialization config; that of the blocks is in ``decoder``.
    """

    def __init__(
        self,
        decoder: Mapping,
        num_things_classes: int,
        num_stuff_classes: int,
        loss_cls: Mapping = LOSS_CLS,
        loss_mask: Mapping = LOSS_MASK,
        loss_dice: Mapping = LOSS_DICE,
        train_cfg: Mapping | None = None,
        test_cfg: Mapping | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        BaseModule.__init__(self, init_cfg)  # Mask2Former's builds a pixel decoder
        self.num_things_classes = num_things_classes
        self.num_stuff_classes = num_stuff_classes
        self.num_classes = num_things_classes + num_stuff_classes
        self.decoder = QueryDecoder(self.num_classes, **decoder)
        self.num_queries = self.decoder.num_queries
        self.train_cfg = ConfigDict({**TRAIN_CFG, **(train_cfg or {})})
        self.test_cfg = test_cfg
        self.assigner = TASK_UTILS.build(self.train_cfg.assigner)
        self.sampler = TASK_UTILS.build(self.train_cfg.sampler, default_args=dict(context=self))
        self.num_points = self.train_cfg.num_points
        self.oversample_ratio = self.train_cfg.oversample_ratio
        self.importance_sample_ratio = self.train_cfg.importance_sample_ratio
        weights = [1.0] * self.num_classes + [NO_OBJECT_WEIGHT]
        loss_cls = dict(class_weight=weights) | dict(loss_cls)
        self.class_weight = loss_cls['class_weight']
        self.loss_cls, self.loss_mask, self.loss_dice = map(
            MODELS.build, (loss_cls, dict(loss_mask), dict(loss_dice))
        )

    def init_weights(self) -> None:
        """Initialize the decoder, and load its blocks."""
        BaseModule.init_weights(self)

    def forward(
        self, x: Sequence[Tensor], batch_data_samples: Sequence | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of classes and masks, see :class:`~mmtoken.heads.query_decoder.QueryDecoder`.

        Args:
            x: Outputs of a backbone with ``out_prefix=True``: a map ``(B, C, H, W)`` and prefix
                tokens ``(B, P, C)``.
            batch_data_samples: Not used.

        Raises:
            ValueError: Other outputs.
        """
        if len(x) != 2 or x[0].ndim != 4 or x[1].ndim != 3:
            shapes = [tuple(t.shape) for t in x]
            raise ValueError(
                f'{type(self).__name__} needs a map and prefix tokens, those of a backbone on '
                f'plain ViT with out_prefix=True and one of out_indices, got {shapes}'
            )
        return self.decoder(*x)
