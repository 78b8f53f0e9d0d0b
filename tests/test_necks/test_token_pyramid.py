import pytest
import torch

from mmtoken.layers.common.packed import pack_equal
from mmtoken.necks.token_pyramid import SparseFeaturePyramid


class Neck(SparseFeaturePyramid):
    """Restores zeros, and says which taps."""

    def __init__(self, **kwargs):
        super().__init__(in_channels=8, out_channels=4, **kwargs)
        self.restored = []

    def restore(self, index, features):
        self.restored.append((index, features))
        return torch.zeros(1, 8, *features.grid)


def test_maps_are_refused():
    message = "out_type='tokens', got Tensor; for maps use mmtoken.SimpleFeaturePyramid"
    with pytest.raises(TypeError, match=message):
        Neck()([torch.zeros(1, 8, 4, 4)])


def test_last_tap_alone_is_restored():
    neck, taps = Neck(), [pack_equal(torch.zeros(1, 3, 8), (4, 4)) for _ in range(2)]
    assert neck.num_taps == 1
    maps = neck(taps)
    ((index, restored),) = neck.restored
    assert index == 0 and restored is taps[1] and len(maps) == 5


def test_every_tap_is_restored_for_its_level():
    neck, taps = Neck(multi_level=True), [pack_equal(torch.zeros(1, 3, 8), (4, 4))] * 4
    assert neck.num_taps == 4
    neck(taps)
    assert [index for index, _ in neck.restored] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match='4'):
        neck(taps[:3])
