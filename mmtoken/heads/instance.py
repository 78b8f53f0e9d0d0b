"""The encoder-only head for mmdet."""

from mmdet.models.dense_heads import Mask2FormerHead

from ..registry import MODELS
from .encoder_only import EncoderOnly


@MODELS.register_module()
class EncoderOnlyInstanceHead(EncoderOnly, Mask2FormerHead):
    """Masks of instances, or of things and stuff, from queries in the last blocks of a plain ViT.

    The ``panoptic_head`` of mmdet's ``Mask2Former`` and ``MaskFormer``, without a neck.

    Source: EoMT, arXiv 2503.19108; losses and results are mmdet's.
    """
