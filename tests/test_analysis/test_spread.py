import pytest

from mmtoken.analysis.spread import spread


def test_of_five():
    expected = dict(mean=4, std=5**0.5 * 2**0.5, min=1, q1=2, median=3, q3=4, max=10)
    assert spread([10, 2, 3, 1, 4]) == pytest.approx(dict(expected, std=12.5**0.5))


def test_one_value_has_no_deviation():
    assert spread([3.0]) == dict(mean=3, std=None, min=3, q1=3, median=3, q3=3, max=3)
