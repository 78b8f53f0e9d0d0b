import torch

from mmtoken.layers.common.precision import full_precision


def test_types_are_kept_under_autocast():
    x = torch.ones(2, 2)
    with torch.autocast('cpu', torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x.device):
            assert (x @ x).dtype == torch.float32


def test_devices_without_autocast_have_nothing_to_switch_off():
    x = torch.ones(2, 2, device='meta')
    with full_precision(x.device):
        assert (x @ x).dtype == torch.float32
