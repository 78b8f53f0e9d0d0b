import pytest
import torch
from mmengine.registry import MODELS

from mmtoken.analysis.peers import PEERS, peer_config
from mmtoken.registry import MODELS as OURS

ARCHS = dict(
    STViTRSwin=dict(embed_dims=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8)),
    STViTDeiT=dict(embed_dims=64, num_layers=8, num_heads=2, feedforward_channels=128),
)


@pytest.mark.parametrize('name', sorted(PEERS))
def test_peers_have_our_maps_and_nearly_our_parameters(name):
    cfg = dict(type=f'mmtoken.{name}', arch=ARCHS[name])
    twin = OURS.build(cfg | OURS.get(name).twin_args)
    peer = MODELS.build(peer_config(cfg))
    twin.eval()
    peer.eval()
    images = torch.zeros(1, 3, 64, 96)
    assert [m.shape for m in peer(images)] == [m.shape for m in twin(images)]
    counts = [sum(p.numel() for p in network.parameters()) for network in (peer, twin)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_no_peer(monkeypatch):
    cfg = dict(type='mmtoken.STViTRSwin')
    assert peer_config(cfg)['type'] == 'mmdet.SwinTransformer'
    monkeypatch.setattr('mmtoken.analysis.peers.find_spec', lambda library: None)
    assert peer_config(cfg) is None
    monkeypatch.setattr('mmtoken.analysis.peers.PEERS', {})
    assert peer_config(cfg) is None
