"""Two processes train behind a neck that leaves maps out, without ``find_unused_parameters``."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

TESTS = Path(__file__).parents[1]
STEPS = 2  # DDP finds out in the second


class Detector(nn.Module):
    """Uses what mmdet's FPN uses with ``start_level=1``."""

    def __init__(self, backbone, start_level):
        super().__init__()
        self.backbone = backbone
        self.start_level = start_level

    def forward(self, images):
        import mmtoken

        with mmtoken.token_losses() as published:
            maps = self.backbone(images)
        return sum(m.square().mean() for m in maps[self.start_level :]) + published.total()


def work(rank, port):
    """Train each backbone for some steps, and once more with fewer stages."""
    sys.path[:0] = [str(TESTS), str(TESTS / 'test_backbones')]
    from families import FAMILIES
    from test_contract import build

    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    distributed.init_process_group('gloo', rank=rank, world_size=2)
    for name, family in FAMILIES.items():
        cfg = dict(type=f'mmtoken.{name}', **family.variants[0])
        for out_indices, start_level in ((None, 1), ((1,), 0)):
            torch.manual_seed(0)
            changed = {} if out_indices is None else dict(out_indices=out_indices)
            model = DistributedDataParallel(Detector(build(cfg, **changed).train(), start_level))
            torch.manual_seed(rank)
            for _ in range(STEPS):
                model.zero_grad()
                model(torch.randn(1, 3, 64, 64)).backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            other = gradients.clone()
            distributed.all_reduce(other)
            torch.testing.assert_close(other / 2, gradients)
    del model  # torch 2.13 may hang if DDP is the last that holds the group
    distributed.destroy_process_group()


def test_every_backbone_in_two_processes():
    port = str(29600 + os.getpid() % 1000)
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), port]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]


if __name__ == '__main__':
    work(int(sys.argv[1]), sys.argv[2])
