"""Labels reach a backbone as they are after all augmentation."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from mmtoken.engine.sample_labels import labels_of_samples

SHAPE = (8, 12)  # of the batch


def test_classes_of_a_segmenter():
    labels = torch.randint(0, 4, (1, 8, 12))
    labels[:, :, 7:] = 255
    found = labels_of_samples([SegDataSample(gt_sem_seg=PixelData(data=labels))], SHAPE)
    assert torch.equal(found[0, :, :7], labels[0, :, :7]) and (found[0, :, 7:] == -1).all()


def detection_sample(**instances):
    return DetDataSample(metainfo=dict(img_shape=(6, 10)), gt_instances=InstanceData(**instances))


MASKS = np.zeros((2, 6, 10), np.uint8)
MASKS[0, 1:4, 2:5] = 1
MASKS[1, 3:6, 4:10] = 1
BOXES = torch.tensor([[4.0, 3, 10, 6], [2, 1, 5, 4]])  # the larger one first
POLYGONS = [
    [np.array([2.0, 1, 5, 1, 5, 4, 2, 4])], [np.array([4.0, 3, 10, 3, 10, 6, 4, 6])],
]  # fmt: skip


@pytest.mark.parametrize(
    'instances',
    [
        dict(masks=BitmapMasks(MASKS, 6, 10)),
        dict(masks=BitmapMasks(np.pad(MASKS, ((0, 0), (0, 2), (0, 2))), 8, 12)),  # pad_mask=True
        dict(masks=PolygonMasks(POLYGONS, 6, 10)),
        dict(masks=torch.from_numpy(MASKS)),
        dict(bboxes=BOXES),
        dict(bboxes=HorizontalBoxes(BOXES)),
    ],
    ids=['bitmaps', 'padded', 'polygons', 'tensor', 'boxes', 'box class'],
)
def test_instances_of_a_detector(instances):
    (found,) = labels_of_samples([detection_sample(**instances)], SHAPE)
    assert (found[6:] == -1).all() and (found[:, 10:] == -1).all()  # padding
    inside = found[:6, :10]
    assert ((inside > 0) == torch.from_numpy(MASKS).any(0)).all()
    first, second = inside[1, 2], inside[5, 9]
    assert 0 < first != second > 0 and (inside[1:3, 2:5] == first).all()
    assert (inside[4:, 4:] == second).all()


def test_images_without_instances():
    empty = BitmapMasks(np.zeros((0, 6, 10), np.uint8), 6, 10)
    for instances in (dict(masks=empty), dict(bboxes=torch.zeros(0, 4))):
        (found,) = labels_of_samples([detection_sample(**instances)], SHAPE)
        assert (found[:6, :10] == 0).all()


def test_samples_without_labels():
    assert labels_of_samples(None, SHAPE) is None
    assert labels_of_samples([SegDataSample()], SHAPE) is None
    assert labels_of_samples([detection_sample(labels=torch.zeros(1))], SHAPE) is None
