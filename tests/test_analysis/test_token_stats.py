import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from mmtoken.analysis.recording import RecordedBatch
from mmtoken.analysis.token_stats import annotated, collect, object_regions
from mmtoken.runtime.decisions import RoutingDecision

IMAGES = torch.zeros(1, 3, 16, 24)  # 4 x 6 tokens of 4 pixels: one whole region and half of one


def decide(*choice, grid=(4, 6)):
    return RoutingDecision(torch.tensor([[choice]]), (1, 2, 4), 4, grid, None)


def test_regions_are_objects_by_half_of_their_pixels():
    objects, valid = torch.zeros(1, 16, 24, dtype=torch.bool), torch.ones(1, 16, 24) > 0
    objects[0, :8, :16] = True
    assert object_regions(objects, valid, decide(0, 0), 4).tolist() == [[[True, False]]]
    objects[0, 7, 0] = False
    assert not object_regions(objects, valid, decide(0, 0), 4).any()
    valid[0, 8:] = False  # padding counts for neither
    assert object_regions(objects, valid, decide(0, 0), 4).tolist() == [[[True, False]]]


def test_statistics_by_stage_and_of_all():
    everything = torch.ones(1, 16, 16, dtype=torch.bool)
    images, one, two = torch.zeros(1, 3, 16, 16), (4, 4), (2, 2)
    object_, background = (
        (RecordedBatch(images, [], [decide(c, grid=one), decide(1, grid=two)]), mask, everything)
        for c, mask in ((0, everything), (1, ~everything))
    )
    stats = collect([object_, background])
    assert stats['images'] == 2
    first, second = stats['stages']
    coarse = first.pop('coarse_ratio')
    assert first == dict(stride=4, query_ratio=20 / 32, objects=1.0, background=0.25, contrast=4.0)
    assert coarse == dict(all=0.0, objects=0.0, background=0.0)
    # Cut-off regions are neither objects nor background.
    assert second.pop('coarse_ratio') == dict(all=0.0, objects=None, background=None)
    assert second == dict(stride=8, query_ratio=1 / 4, objects=None, background=None, contrast=None)
    assert stats['overall']['query_ratio'] == (16 + 1 + 4 + 1) / 40
    assert stats['overall']['contrast'] == 4
    assert stats['per_image']['max'] == 17 / 20 and stats['per_image']['min'] == 5 / 20


def test_gates_that_choose_once():
    """As MSViT does: fine or coarse, in regions of 2 x 2 patches of 4 pixels."""

    def decide_once(*choice):
        choice = torch.tensor([choice]).view(1, 2, 3)
        padding = torch.zeros(1, 2, 3, dtype=torch.bool)
        padding[0, :, 2] = True  # always coarse
        return RoutingDecision(choice, (1, 2), 2, (4, 6), padding, per_network=True)

    objects = torch.zeros(1, 16, 24, dtype=torch.bool)
    objects[:, :8] = True
    half = RecordedBatch(IMAGES, [], [decide_once(0, 0, 1, 1, 1, 1)])
    most = RecordedBatch(IMAGES, [], [decide_once(0, 1, 1, 1, 1, 1)])
    stats = collect((watched, objects, ~torch.zeros_like(objects)) for watched in (half, most))
    assert stats['unit'] == 'tokens per fine patch'
    assert stats['overall']['coarse_ratio'] == dict(all=5 / 8, objects=1 / 4, background=1.0)
    assert stats['overall']['query_ratio'] == (10 + 7) / 32
    assert stats['overall']['contrast'] == (3 * 4 + 1) / 4
    spread = stats['per_image']['coarse_ratio']
    assert (spread['mean'], spread['min'], spread['max']) == (5 / 8, 1 / 2, 3 / 4)
    assert spread['std'] == pytest.approx(0.125 * 2**0.5)
    assert stats['per_image']['mean'] == (10 + 7) / 32


def test_contrast_of_all_is_within_stages():
    """Objects that fill more of a fine stage have no more queries for that."""
    everything = torch.ones(1, 16, 16, dtype=torch.bool)
    images = torch.zeros(1, 3, 16, 16)
    fine, coarse = decide(0, grid=(4, 4)), decide(2, grid=(4, 4))
    stages = collect(
        [
            (RecordedBatch(images, [], [fine, decide(0, grid=(2, 2))]), everything, everything),
            (RecordedBatch(images, [], [fine, decide(0, grid=(2, 2))]), ~everything, everything),
        ]
    )
    assert stages['overall']['contrast'] == 1
    with pytest.raises(ValueError, match='chooses'):
        collect([(RecordedBatch(images, [], []), everything, everything)])
    with pytest.raises(ValueError, match='no image'):
        collect([])
    assert (
        collect([(RecordedBatch(images, [], [coarse]), everything, everything)])['per_image']['std']
        is None
    )


def test_objects_of_detectors():
    masks = np.zeros((1, 8, 8), np.uint8)
    masks[0, :4] = 1
    meta = dict(img_shape=(16, 16), ori_shape=(8, 8))
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(masks=BitmapMasks(masks, 8, 8))
    objects, valid = annotated(RecordedBatch(IMAGES, [sample], []))
    assert valid[0, :16, :16].all() and valid.sum() == 256
    assert objects[0, :8, :16].all() and objects.sum() == 128
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[0.0, 0.0, 8.0, 4.0]]))
    assert annotated(RecordedBatch(IMAGES, [sample], []))[0].equal(objects)
    with pytest.raises(ValueError, match='no annotations'):
        annotated(RecordedBatch(IMAGES, [DetDataSample(metainfo=meta)], []))


def test_objects_of_segmenters():
    labels = torch.tensor([[0, 0, 1, 255]]).repeat_interleave(4, 1).repeat(8, 1)
    sample = SegDataSample(metainfo=dict(img_shape=(16, 24)))
    sample.gt_sem_seg = PixelData(data=labels[None])
    objects, valid = annotated(RecordedBatch(IMAGES, [sample], []), background=[0])
    assert valid.all() and objects.any(dim=1)[0].tolist() == [False] * 12 + [True] * 6 + [False] * 6
