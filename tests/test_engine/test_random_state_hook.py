"""A training that was interrupted goes on bit for bit as one that was not."""

import random

import numpy as np
import pytest
import torch
from families import FAMILIES
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from mmtoken.engine.random_state_hook import get_states, is_due, set_states

HOOKS = [dict(type='mmtoken.RandomStateHook'), dict(type='mmtoken.TokenLossHook')]


class Dataset(torch.utils.data.Dataset):
    """Augmented images: every pass draws from all three generators."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64) * (index + 1)
        noise = random.random() + np.random.rand()
        return dict(inputs=image + noise * torch.rand(3, 64, 64))


class Model(BaseModel):
    """A backbone of ours, and dropout."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, mode='tensor'):
        if mode == 'loss':
            return self.loss(inputs)
        return [torch.rand(()).item()]  # a test that draws

    def loss(self, inputs):
        maps = self.backbone(inputs)
        return dict(loss=sum(self.dropout(x).square().mean() for x in maps))


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(mean=sum(results))


class Interrupt(Hook):
    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            raise KeyboardInterrupt


def loader(sampler):
    return dict(
        dataset=Dataset(), sampler=dict(type=sampler, shuffle=True), batch_size=2, num_workers=0,
        collate_fn=dict(type='default_collate'),
    )  # fmt: skip


def make_runner(folder, backbone, by_epoch=False, hooks=(), sampler=None, **kwargs):
    length = dict(max_epochs=2) if by_epoch else dict(max_iters=4)
    sampler = sampler or ('DefaultSampler' if by_epoch else 'InfiniteSampler')
    torch.manual_seed(0)
    return Runner(
        model=Model(backbone),
        work_dir=str(folder),
        train_dataloader=loader(sampler),
        train_cfg=dict(by_epoch=by_epoch, val_interval=1, **length),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        val_dataloader=loader('DefaultSampler'),
        val_cfg={},
        val_evaluator=[Metric()],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=1)),
        custom_hooks=[*HOOKS, *hooks],
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}_{id(kwargs)}',
        log_level='ERROR',
        **kwargs,
    )


def trained(runner):
    runner.train()
    optimizer = runner.optim_wrapper.state_dict()['state']
    return runner.model.state_dict(), [s['exp_avg'] for s in optimizer.values()]


def in_two_parts(folder, backbone, by_epoch=False, without=(), at=2, **kwargs):
    """Interrupted before iteration ``at`` or in the second epoch, and resumed."""
    with pytest.raises(KeyboardInterrupt):
        make_runner(
            folder, backbone, by_epoch, [Interrupt(3 if by_epoch else at)], **kwargs
        ).train()
    file = folder / ('epoch_1.pth' if by_epoch else f'iter_{at}.pth')
    if without:
        checkpoint = torch.load(file, weights_only=False)
        for key in without:
            del checkpoint[key]
        torch.save(checkpoint, file)
    kwargs |= dict(load_from=str(file), resume=True)
    return trained(make_runner(folder, backbone, by_epoch, **kwargs))


def network(name):
    args = dict(type=f'mmtoken.{name}', **FAMILIES[name].small)
    return args if name == 'PSViT' else dict(args, drop_path_rate=0.3)


def assert_same(got, wanted):
    for name, tensor in wanted[0].items():
        assert torch.equal(got[0][name], tensor), name
    assert all(map(torch.equal, got[1], wanted[1]))


@pytest.mark.parametrize('name', FAMILIES)
def test_every_backbone_goes_on(name, tmp_path):
    backbone = network(name)
    whole = trained(make_runner(tmp_path / 'whole', backbone))
    assert_same(in_two_parts(tmp_path / 'parts', backbone), whole)


def test_by_epochs(tmp_path):
    whole = trained(make_runner(tmp_path / 'whole', network('DGEPVT'), by_epoch=True))
    assert_same(in_two_parts(tmp_path / 'parts', network('DGEPVT'), by_epoch=True), whole)


@pytest.mark.parametrize('at', [1, 2, 3])
def test_an_iteration_loop_over_a_finite_sampler(at, tmp_path):
    """The data end after two iterations, and the loader starts anew."""
    whole = trained(make_runner(tmp_path / 'whole', network('DGEPVT'), sampler='DefaultSampler'))
    parts = in_two_parts(tmp_path / 'parts', network('DGEPVT'), at=at, sampler='DefaultSampler')
    assert_same(parts, whole)


def test_without_states_it_is_another_training(tmp_path, caplog):
    """So the tests above could fail."""
    whole = trained(make_runner(tmp_path / 'whole', network('DGEPVT')))
    with pytest.raises(AssertionError):
        assert_same(
            in_two_parts(tmp_path / 'parts', network('DGEPVT'), without=['random_states']), whole
        )


def test_weights_to_start_from_restore_nothing(tmp_path):
    make_runner(tmp_path / 'first', network('DGEPVT')).train()
    file = str(tmp_path / 'first' / 'iter_4.pth')
    results = []
    for folder in ('second', 'third'):
        runner = make_runner(tmp_path / folder, network('DGEPVT'), load_from=file)
        torch.manual_seed(len(results))
        results.append(trained(runner)[0])
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_states_are_plain_and_complete(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3)

    random.gauss(0, 1)
    np.random.randn()
    torch.save(get_states(), tmp_path / 'states.pth')
    first = draw()
    set_states(torch.load(tmp_path / 'states.pth', weights_only=True))
    second = draw()
    assert first[:3] == second[:3] and torch.equal(first[3], second[3])


@pytest.mark.parametrize(
    'iteration, save_last, due', [(3, False, True), (4, False, False), (7, True, True)]
)
def test_states_are_collected_when_a_checkpoint_is_due(iteration, save_last, due):
    from types import SimpleNamespace

    from mmengine.hooks import CheckpointHook

    hook = CheckpointHook(interval=4, by_epoch=False, save_last=save_last)
    runner = SimpleNamespace(iter=iteration, max_iters=8)
    assert is_due(hook, runner, by_epoch=False) == due
    assert not is_due(hook, runner, by_epoch=True)
