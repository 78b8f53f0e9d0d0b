import pytest

from mmtoken.backbones.swin_base import SwinBackbone


class Backbone(SwinBackbone):
    arch_zoo = dict(nano=dict(embed_dims=8, depths=(1, 2), num_heads=(1, 2)))


def test_known_and_own_architectures():
    assert Backbone.resolve_arch('nano') == Backbone.arch_zoo['nano']
    own = dict(embed_dims=16, depths=[2], num_heads=[4])
    assert Backbone.resolve_arch(own) == dict(embed_dims=16, depths=(2,), num_heads=(4,))


@pytest.mark.parametrize(
    'arch, message',
    [
        ('tiny', 'tiny.*nano'),
        (dict(embed_dims=8, depths=(1, 2)), 'num_heads'),
        (dict(embed_dims=8, depths=(1, 2), num_heads=(1,)), 'one number a stage'),
        (dict(embed_dims=8, depths=(), num_heads=()), 'one number a stage'),
        (dict(embed_dims=8, depths=(1, 2), num_heads=(1, 3)), 'stage 1: '),
    ],
)
def test_other_architectures_are_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        Backbone.resolve_arch(arch)
