import numpy as np
import pytest
import torch
from mmengine.registry import METRICS, DefaultScope

from mmtoken.evaluation import BoundaryIoUMetric
from mmtoken.evaluation.boundary_iou import near_edges


def reference(labels, width, ignore_index=255):
    """Pixel by pixel."""
    height, length = labels.shape
    near = torch.zeros_like(labels, dtype=torch.bool)
    for row in range(height):
        for column in range(length):
            window = labels[
                max(0, row - width) : row + width + 1, max(0, column - width) : column + width + 1
            ]
            others = (window != labels[row, column]) & (window != ignore_index)
            near[row, column] = others.any() and labels[row, column] != ignore_index
    return near


@pytest.mark.parametrize('width', [1, 3])
def test_pixels_near_another_label(width):
    labels = torch.zeros(20, 24, dtype=torch.long)
    labels[6:13, 9:15] = 2
    labels[12:, 20:] = 7
    labels[5:9, :4] = 255
    near = near_edges(labels[None], width)
    assert torch.equal(near[0], reference(labels, width)) and near.any() and not near.all()


def test_ignored_pixels_make_no_edge():
    labels = torch.zeros(1, 9, 9, dtype=torch.long)
    labels[0, 4, 4] = 255
    assert not near_edges(labels, 3).any()


def score(metric, predicted, labels):
    metric.dataset_meta = dict(classes=('ground', 'thing'))
    sample = dict(
        pred_sem_seg=dict(data=predicted[None]), gt_sem_seg=dict(data=labels[None]), img_path='x'
    )
    metric.process({}, [sample])
    assert torch.equal(sample['gt_sem_seg']['data'][0], labels)  # for the metrics behind it
    return metric.evaluate(1)


def test_scores_of_these_pixels_alone():
    labels = torch.zeros(16, 16, dtype=torch.long)
    labels[:, 8:] = 1
    predicted = labels.clone()
    predicted[:, 0] = 1  # far from the edge
    assert score(BoundaryIoUMetric(), predicted, labels)['boundary/mIoU'] == 100
    predicted[:, 7] = 1  # one of six columns that count
    scores = score(BoundaryIoUMetric(prefix='edges'), predicted, labels)
    assert scores['edges/mIoU'] == pytest.approx(100 * (2 / 3 + 3 / 4) / 2, abs=0.01)
    assert np.isclose(scores['edges/aAcc'], 100 * 5 / 6, atol=0.01)


@pytest.mark.parametrize('width', [0, -1, 1.5, True])
def test_bad_width(width):
    with pytest.raises(ValueError, match='positive integer'):
        BoundaryIoUMetric(width)


def test_is_found_from_mmseg():
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert METRICS.get('mmtoken.BoundaryIoUMetric') is BoundaryIoUMetric
