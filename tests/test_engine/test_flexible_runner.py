"""MMEngine's FlexibleRunner trains a backbone in two processes, and reads its checkpoints.

DDP resumes a training; of FSDP only weights are read. MMEngine 0.10 gives the optimizer to PyTorch
2.1 and later in another order than these take it, and a state dict that is not sharded
(``state_dict_cfg='full'``) crashes in PyTorch where there is no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner
from torch import nn

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)] * (str(TESTS) not in sys.path)
from families import FAMILIES  # noqa: E402
from helpers import TORCH_2_1  # noqa: E402

NAMES = ('STViTRSwin', 'MSViT')
STRATEGIES = {
    'ddp': dict(
        type='DDPStrategy', model_wrapper=dict(device_ids=None, find_unused_parameters=False)
    ),
    'fsdp': dict(
        type='FSDPStrategy',
        model_wrapper=dict(device_id=torch.device('cpu'), use_orig_params=True),
        state_dict_cfg='local',
    ),
}


class Model(BaseModel):
    """A backbone that learns to give zeros."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(self.backbone.out_channels[-1], 2, 1)

    def forward(self, inputs, mode='loss'):
        return self.loss(inputs)

    def loss(self, inputs, data_samples=None):
        maps = self.backbone(torch.stack(list(inputs)))
        return dict(loss_map=self.head(maps[-1]).square().mean())


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 64, 64, generator=generator))


def make_runner(strategy, name, folder, lr=1e-3, **kwargs):
    torch.manual_seed(0)
    small = dict(type=f'mmtoken.{name}', drop_path_rate=0.0, norm_eval=True)
    model = Model({**small, **FAMILIES[name].small})
    return FlexibleRunner(
        model,
        work_dir=str(folder),
        strategy=STRATEGIES[strategy],
        train_dataloader=dict(
            dataset=Images(),
            batch_size=2,
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)),
        train_cfg=dict(by_epoch=False, max_iters=2),
        default_hooks=dict(
            token_losses=dict(type='mmtoken.TokenLossHook'),
            random_states=dict(type='mmtoken.RandomStateHook'),
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
        ),
        randomness=dict(seed=0),
        cfg=Config(dict(default_scope='mmengine')),
        log_level='ERROR',
        **kwargs,
    )


def weights_of(runner):
    runner.train()
    state = runner.strategy.model_state_dict()
    return {name: getattr(value, 'local_tensor', value.clone)() for name, value in state.items()}


def work(folder, strategy, rank):
    """One of two processes."""
    os.environ.update(LOCAL_RANK='0', RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        trained = weights_of(make_runner(strategy, name, folder / name))
        if strategy == 'ddp':
            again = dict(load_from=str(folder / name / 'iter_1.pth'), resume=True)
        else:  # the weights, which do not change any more
            again = dict(load_from=str(folder / name / 'iter_2.pth'), lr=0.0)
        results[name] = trained, weights_of(make_runner(strategy, name, folder / 'again', **again))
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize(
    'strategy',
    [
        'ddp',
        pytest.param(
            'fsdp', marks=pytest.mark.skipif(TORCH_2_1, reason='FSDP of torch 2.1 needs a GPU')
        ),
    ],
)
def test_two_processes_read_their_checkpoints(strategy, tmp_path):
    commands = [[sys.executable, __file__, tmp_path, strategy, str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    for name in NAMES:
        for result in results:
            trained, again = result[name]
            torch.testing.assert_close(again, trained, rtol=0, atol=0)
        if strategy == 'ddp':
            torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


if __name__ == '__main__':
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
