import pytest
import torch

import mmtoken
from mmtoken.layers.common.labels import label_purity, noted_labels


def test_purity_is_the_share_of_the_most_frequent_label():
    labels = torch.randint(-1, 4, (2, 11, 13))
    purity, known = label_purity(labels, 4)
    assert purity.shape == known.shape == (2, 3, 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                cell = labels[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                counts = cell[cell >= 0].bincount()
                assert known[image, row, column] == (counts.sum() > 0)
                expected = float(counts.max() / counts.sum()) if len(counts) else 1.0
                assert purity[image, row, column] == pytest.approx(expected)


def test_pixels_without_a_label_do_not_count():
    labels = torch.full((1, 4, 4), -1)
    purity, known = label_purity(labels, 4)
    assert purity == 1 and not known
    labels[0, 0, 0], labels[0, 0, 1] = 3, 5
    purity, known = label_purity(labels, 4)
    assert purity == 0.5 and known


def test_labels_are_noted_on_a_batch():
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match='mmtoken.set_label_maps'):
        noted_labels(images)
    mmtoken.set_label_maps(images, labels)
    assert noted_labels(images).dtype == torch.int64
    for wrong in (labels[:1], labels.float(), labels[:, :4]):
        with pytest.raises(ValueError, match=r'integers of shape \(2, 8, 8\)'):
            mmtoken.set_label_maps(images, wrong)
