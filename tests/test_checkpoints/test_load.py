import pytest
import torch
from torch import nn

from mmtoken.checkpoints import load_into


class Net(nn.Linear):
    unused_keys = r'head\..*'
    fresh_keys = r'bias'


def save(tmp_path, content):
    torch.save(content, tmp_path / 'file.pth')
    return str(tmp_path / 'file.pth')


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('start', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_layouts(wrapper, start, tmp_path):
    weight = torch.randn(2, 3)
    content = {f'{start}weight': weight, f'{start}head.bias': torch.zeros(1)}
    net = Net(3, 2)
    bias = net.bias.clone()
    load_into(net, save(tmp_path, {wrapper: content} if wrapper else content))
    assert torch.equal(net.weight, weight) and torch.equal(net.bias, bias)


@pytest.mark.parametrize(
    'content, message',
    [
        ([1, 2], 'holds no weights'),
        (dict(epoch=3), 'holds no weights'),
        (dict(bias=torch.zeros(2)), 'names it lacks: weight'),
        (dict(weight=torch.zeros(2, 3), gate=torch.zeros(1)), 'should not have: gate'),
        (dict(weight=torch.zeros(3, 3)), r'weight \(3, 3\) instead of \(2, 3\)'),
    ],
)
def test_what_does_not_fit_is_refused(content, message, tmp_path):
    net = Net(3, 2)
    before = net.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_into(net, save(tmp_path, content))
    assert torch.equal(net.weight, before)


def test_wrong_prefix_is_named(tmp_path):
    file = save(tmp_path, {'encoder.weight': torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"prefix 'backbone\.'.*\['encoder'\]"):
        load_into(Net(3, 2), file, prefix='backbone')
