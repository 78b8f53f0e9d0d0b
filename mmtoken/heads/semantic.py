"""The encoder-only head for mmseg."""

from mmseg.models.decode_heads import Mask2FormerHead

from ..registry import MODELS
from .encoder_only import EncoderOnly


@MODELS.register_module()
class EncoderOnlySemanticHead(EncoderOnly, Mask2FormerHead):
    """Masks of classes from queries in the last blocks of a plain ViT.

    The ``decode_head`` of mmseg's ``EncoderDecoder``, without a neck.

    Source: EoMT, arXiv 2503.19108; losses and results are mmseg's.

    Args:
        num_classes: Of the data set.
        ignore_index: Label of pixels that do not count.
        align_corners: Of interpolations by the segmentor.
        kwargs: As for :class:`~mmtoken.heads.encoder_only.EncoderOnly`.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, align_corners: bool = False, **kwargs
    ) -> None:
        EncoderOnly.__init__(self, num_things_classes=0, num_stuff_classes=num_classes, **kwargs)
        self.out_channels = num_classes
        self.ignore_index = ignore_index
        self.align_corners = align_corners
