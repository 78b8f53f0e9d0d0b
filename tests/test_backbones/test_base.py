import pytest

from mmtoken.backbones.base import check_out_indices, check_out_type, resolve_arch

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def test_resolve_arch():
    zoo = dict(tiny=dict(dims=1), small=dict(dims=2))
    assert resolve_arch('t', zoo, ['dims']) == dict(dims=1) == resolve_arch('tiny', zoo, ['dims'])
    assert resolve_arch(dict(dims=3), zoo, ['dims']) == dict(dims=3)
    with pytest.raises(ValueError, match=r"arch is 'huge'; known are \['small', 'tiny'\]"):
        resolve_arch('huge', zoo, ['dims'])
    with pytest.raises(ValueError, match=r"has the keys \['dims'\], got \['heads'\]"):
        resolve_arch(dict(heads=3), zoo, ['dims'])
    with pytest.raises(TypeError, match='a name or a dict, got int'):
        resolve_arch(3, zoo, ['dims'])


def test_out_indices():
    assert check_out_indices(-1, 4) == (3,) and check_out_indices([0, -1], 4) == (0, 3)
    for bad in ((), (1, 1), (2, 1), (4,), (-5,)):
        with pytest.raises(ValueError, match='rising indices from 0 to 3'):
            check_out_indices(bad, 4)


def test_out_type():
    check_out_type('map', ('map',), (0, 1), 3)
    with pytest.raises(ValueError, match=r"one of \('map',\), got 'tokens'"):
        check_out_type('tokens', ('map',), (3,), 3)
    with pytest.raises(ValueError, match='is of the last stage'):
        check_out_type('avg_featmap', ('avg_featmap',), (0, 3), 3)
    with pytest.raises(ValueError, match='needs cls_token=True'):
        check_out_type('cls_token', ('cls_token',), (3,), 3)
