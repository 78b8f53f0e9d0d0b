import pytest
import torch

from mmtoken.losses import LabelPurityLoss

SIDES, REGION = (4, 8, 16), 16  # three granularities


def labels_with(*boxes):
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    for top, left, side in boxes:
        labels[:, top : top + side, left : left + side] = 1
    return labels


@pytest.mark.parametrize(
    'boxes, target',
    [
        ([], [[2, 2], [2, 2]]),
        ([(0, 0, 16)], [[2, 2], [2, 2]]),
        ([(0, 0, 8)], [[1, 2], [2, 2]]),  # cells of 8 pixels keep it
        ([(0, 0, 4)], [[0, 2], [2, 2]]),
        ([(0, 0, 5)], [[0, 2], [2, 2]]),  # what no cell keeps is as fine as can be
        ([(12, 12, 8)], [[0, 0], [0, 0]]),
    ],
)
def test_coarsest_choice_that_keeps_the_labels(boxes, target):
    found, known = LabelPurityLoss().targets(labels_with(*boxes), SIDES, REGION, (2, 2))
    assert found.tolist() == [target] and known.all()


def test_a_few_pixels_may_differ():
    labels = labels_with((0, 0, 3))  # 9 of 256 pixels
    assert LabelPurityLoss(0.95).targets(labels, (4, 16), 16, (2, 2))[0][0, 0, 0] == 1
    assert LabelPurityLoss(0.97).targets(labels, (4, 16), 16, (2, 2))[0][0, 0, 0] == 0


def test_regions_without_labels_teach_nothing():
    labels = labels_with((0, 0, 5))
    labels[:, 16:] = -1
    scores = torch.randn(1, 2, 2, 3, requires_grad=True)
    LabelPurityLoss()(scores, labels, SIDES, REGION).backward()
    assert (scores.grad[:, 0] != 0).all() and (scores.grad[:, 1] == 0).all()
    nothing = LabelPurityLoss()(scores, torch.full_like(labels, -1), SIDES, REGION)
    assert nothing == 0


def test_images_may_end_inside_a_region():
    whole, cut = labels_with((16, 16, 5)), labels_with((16, 16, 5))[:, :25, :30]
    found = [LabelPurityLoss().targets(x, SIDES, REGION, (2, 2))[0] for x in (whole, cut)]
    assert torch.equal(*found)


def test_scores_are_learned():
    labels = labels_with((0, 0, 5), (16, 0, 8))
    scores = torch.zeros(1, 2, 2, 3, requires_grad=True)
    optimizer, loss_fn = torch.optim.SGD([scores], lr=5.0), LabelPurityLoss()
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(scores, labels, SIDES, REGION).backward()
        optimizer.step()
    assert scores.argmax(dim=-1).tolist() == [[[0, 2], [1, 2]]]


@pytest.mark.parametrize('args', [dict(min_purity=0), dict(min_purity=1), dict(loss_weight=-1)])
def test_arguments(args):
    with pytest.raises(ValueError, match=next(iter(args))):
        LabelPurityLoss(**args)
