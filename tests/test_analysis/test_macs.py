import torch
import torch.nn.functional as F
from torch import nn

from mmtoken.analysis import count_macs


def test_linear_and_convolution():
    assert count_macs(nn.Linear(6, 5), torch.zeros(3, 6)) == 3 * 6 * 5
    assert count_macs(nn.Conv2d(2, 4, 3), torch.zeros(1, 2, 8, 8)) == 6 * 6 * 4 * 2 * 9


def test_fused_attention_is_counted_with_and_without_a_mask():
    query, key = torch.zeros(2, 3, 10, 16), torch.zeros(2, 3, 20, 16)
    expected = 2 * 3 * 10 * 20 * (16 + 16)
    assert count_macs(F.scaled_dot_product_attention, query, key, key) == expected
    bias = torch.zeros(10, 20)
    assert count_macs(F.scaled_dot_product_attention, query, key, key, bias) == expected
