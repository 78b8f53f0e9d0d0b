import inspect

import pytest

from mmtoken.arguments import as_tuple, check_init_cfg, entries_of, is_pretrained
from mmtoken.backbones import DGEDeiT, MSViT, STViTRSwin, SWATDeiT

ARCH = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)


def test_signature_has_the_arguments_of_the_base():
    parameters = inspect.signature(MSViT).parameters
    assert list(parameters)[:3] == ['arch', 'coarse_size', 'fine_size']
    assert {'with_cp', 'out_indices', 'init_cfg'} <= set(parameters)
    assert 'patch_size' not in parameters and 'kwargs' not in parameters
    assert parameters['with_cp'].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    'cls, bad', [(MSViT, 'patch_size'), (DGEDeiT, 'layer_scale'), (SWATDeiT, 'cls_token')]
)
def test_arguments_that_a_class_fixes_itself(cls, bad):
    with pytest.raises(TypeError, match=f'{cls.__name__} takes no {bad}: it takes arch, '):
        cls(**{bad: 1})


def test_unknown_arguments_come_with_a_remedy():
    with pytest.raises(TypeError, match=r'takes no depths: it belongs into arch.*depths='):
        STViTRSwin(depths=(2, 2, 6, 2))
    with pytest.raises(TypeError, match='takes no use_checkpoint: it is with_cp'):
        MSViT(ARCH, use_checkpoint=True)


def test_positional_arguments():
    assert MSViT(ARCH, 64, 32).patch_size == 32


def test_forms_of_init_cfg():
    entry = dict(type='Pretrained', checkpoint='weights.pth')
    assert entries_of(None) == [] and entries_of(entry) == [entry] == entries_of([entry])
    assert is_pretrained(entry) and not is_pretrained(dict(type='Xavier', layer='Linear'))
    for good in (None, [], entry, [entry], dict(type='Xavier', layer='Linear')):
        check_init_cfg(good, 'MSViT')


@pytest.mark.parametrize(
    'bad, error, message',
    [
        ('weights.pth', TypeError, "init_cfg of MSViT is a dict or a list of dicts, got 'weights"),
        (['weights.pth'], TypeError, 'which is no dict'),
        (dict(checkpoint='weights.pth'), ValueError, 'has no type'),
        (dict(type='Pretrained'), ValueError, 'names no checkpoint'),
        (dict(type='Pretrained', checkpoint=''), ValueError, 'names no checkpoint'),
    ],
)
def test_bad_init_cfg(bad, error, message):
    with pytest.raises(error, match=message):
        MSViT(ARCH, init_cfg=bad)


def test_as_tuple():
    assert as_tuple(3) == (3,) and as_tuple([1, 2]) == (1, 2) and as_tuple(None) == (None,)
