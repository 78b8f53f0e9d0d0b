"""How many queries a trained network spends on objects and on background.

Counted are queries per token in all blocks with a router (for a network that chooses once, before
its first block: tokens per fine patch), and the share of regions of the coarsest granularity.

A region is on an object if at least half of its pixels inside the image are; otherwise it is
background. Coarse stages have large regions, in which small objects count as background. Regions
that the border of the grid cuts off are in the total, but count as neither: they have more queries
per token for the same choice.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.decisions import RoutingDecision
from .decisions import (
    coarse_regions,
    count_queries,
    image_coarse_ratios,
    image_ratios,
    ratio_unit,
    real_regions,
    split_stages,
    stride_of,
)
from .recording import RecordedBatch
from .spread import spread

HALF = 0.5
UNLABELED = 255  # in label maps


@dataclass
class Count:
    """Counts for the blocks of a stage, each ``[all, background, objects]``.

    Attributes:
        stride: Of the tokens, in pixels.
        queries, tokens: Their numbers.
        coarse, regions: Numbers of regions of the coarsest granularity, and of all regions.
    """

    stride: int
    queries: list[int] = field(default_factory=lambda: [0, 0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0, 0])
    coarse: list[int] = field(default_factory=lambda: [0, 0, 0])
    regions: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, decision: RoutingDecision, on_object: Tensor) -> None:
        """Count the regions of a block; ``on_object`` is ``(B, Hr, Wr)``."""
        queries, tokens = count_queries(decision)
        tokens, real = tokens.expand_as(queries), real_regions(decision)
        coarse = coarse_regions(decision)
        whole = real & (tokens == decision.region_size**2)
        for i, where in enumerate((real, whole & ~on_object, whole & on_object)):
            self.queries[i] += int(queries[where].sum())
            self.tokens[i] += int(tokens[where].sum())
            self.coarse[i] += int(coarse[where].sum())
            self.regions[i] += int(where.sum())

    @property
    def ratios(self) -> list[float | None]:
        """Queries per token; None where there is no token."""
        return _divide(self.queries, self.tokens)

    @property
    def coarse_ratios(self) -> list[float | None]:
        """Coarsest regions over regions; None where there is no region."""
        return _divide(self.coarse, self.regions)

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(stride=self.stride) | summarize([self])


def _divide(over: list[int], under: list[int]) -> list[float | None]:
    return [a / b if b else None for a, b in zip(over, under, strict=True)]


def summarize(stages: list[Count]) -> dict:
    """Queries per token of some stages, the contrast of objects, and shares of coarse regions.

    The contrast is the number of queries on objects over the number they would have at the ratio of
    the background of the same stage, since the share of objects differs between stages.
    """
    whole = Count(0)
    for stage in stages:
        for name in ('queries', 'tokens', 'coarse', 'regions'):
            pairs = zip(getattr(whole, name), getattr(stage, name), strict=True)
            setattr(whole, name, [a + b for a, b in pairs])
    both = [stage for stage in stages if stage.tokens[1] and stage.tokens[2]]
    expected = sum(stage.tokens[2] * stage.ratios[1] for stage in both)
    query_ratio, background, objects = whole.ratios
    return dict(
        query_ratio=query_ratio,
        objects=objects,
        background=background,
        contrast=sum(stage.queries[2] for stage in both) / expected if both else None,
        coarse_ratio=dict(zip(('all', 'background', 'objects'), whole.coarse_ratios, strict=True)),
    )


def collect(batches: Iterable[tuple[RecordedBatch, Tensor, Tensor]]) -> dict:
    """Statistics over a data set.

    Args:
        batches: A batch, its objects and its images without padding, both ``(B, H, W)``, bool, in
            pixels of the padded images.

    Returns:
        * For ``overall`` and each of ``stages``, over all images: ``query_ratio`` (queries per
          token), the same on ``objects`` and on ``background``, their ``contrast`` (see
          :func:`summarize`), and ``coarse_ratio``, the shares of the coarsest granularity in
          ``all`` regions, on ``objects`` and on ``background``.
        * ``images``: their number.
        * ``per_image``: :func:`~mmtoken.analysis.spread.spread` of their query ratios and, under
          ``coarse_ratio``, of their coarse ratios.
        * ``unit``: what query ratios count, in words.

    Raises:
        ValueError: A network without routers, or no image.
    """
    stages, ratios, coarse, unit = [], [], [], ''
    for batch, objects, valid in batches:
        if not batch.decisions:
            raise ValueError('no part of the model chooses its tokens')
        unit = ratio_unit(batch.decisions)
        ratios += image_ratios(batch.decisions).tolist()
        coarse += image_coarse_ratios(batch.decisions).tolist()
        for i, blocks in enumerate(split_stages(batch.decisions)):
            stride = stride_of(tuple(batch.images.shape[2:]), blocks[0].grid)
            if i == len(stages):
                stages.append(Count(stride))
            on_object = object_regions(objects, valid, blocks[0], stride)
            for decision in blocks:
                stages[i].add(decision, on_object)
    if not ratios:
        raise ValueError('there is no image in the validation set')
    return dict(
        images=len(ratios),
        unit=unit,
        per_image=spread(ratios) | dict(coarse_ratio=spread(coarse)),
        overall=summarize(stages),
        stages=[stage.to_dict() for stage in stages],
    )


def object_regions(
    objects: Tensor, valid: Tensor, decision: RoutingDecision, stride: int
) -> Tensor:
    """Regions at least half of whose pixels are on objects.

    Args:
        objects, valid: See :func:`collect`.
        decision: A decision on the grid.
        stride: Of a token, in pixels.

    Returns:
        ``(B, Hr, Wr)``, bool.
    """
    side = decision.region_size * stride
    rows, columns = decision.choice.shape[1:]
    height, width = objects.shape[1:]
    border = (0, columns * side - width, 0, rows * side - height)
    masks = torch.stack([objects & valid, valid], dim=1).double()
    covered, pixels = F.avg_pool2d(F.pad(masks, border), side).unbind(dim=1)
    return (pixels > 0) & (covered >= HALF * pixels)


def annotated(batch: RecordedBatch, background: Collection[int] = ()) -> tuple[Tensor, Tensor]:
    """Objects and images in a batch, from the annotations of its data samples.

    Objects are the instances of mmdet, crowds included, by their masks or else their boxes, and all
    labeled pixels of mmseg's label maps that are not background. Annotations are those of a test
    pipeline: masks and maps of any size, which are resized to the image, and boxes in the scale of
    the file.

    Args:
        batch: With data samples.
        background: Labels of label maps that are no objects.

    Returns:
        Objects, and images without padding, both ``(B, H, W)``, bool.

    Raises:
        ValueError: There is no annotation.
    """
    size = tuple(batch.images.shape[2:])
    objects = torch.zeros(len(batch.samples), *size, dtype=torch.bool)
    valid = torch.zeros_like(objects)
    for i, sample in enumerate(batch.samples):
        height, width = sample.img_shape[:2]
        valid[i, :height, :width] = True
        objects[i, :height, :width] = _resize(_object_mask(sample, background), (height, width))
    return objects, valid


def _object_mask(sample, background: Collection[int]) -> Tensor:
    """Objects of one image, ``(h, w)``, bool."""
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data[0].cpu()
        no_object = torch.tensor([*background, UNLABELED])
        return ~torch.isin(labels, no_object.to(labels.dtype))
    if 'gt_instances' not in sample:
        raise ValueError(
            'the samples of the validation set have no annotations: its pipeline must load them'
        )
    instances = [sample.gt_instances]
    if 'ignored_instances' in sample:
        instances.append(sample.ignored_instances)
    mask = torch.zeros(sample.ori_shape[:2], dtype=torch.bool)
    for group in instances:
        if 'masks' in group:
            for one in group.masks.to_ndarray():
                mask |= torch.from_numpy(one.astype(bool))
        else:
            for left, top, right, bottom in torch.as_tensor(group.bboxes).round().int().tolist():
                mask[top:bottom, left:right] = True
    return mask


def _resize(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape) == size:
        return mask
    return F.interpolate(mask[None, None].float(), size, mode='nearest')[0, 0].bool()
