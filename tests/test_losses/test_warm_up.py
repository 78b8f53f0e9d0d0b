import pytest
import torch

from mmtoken.losses.warm_up import WarmUpLoss


def test_rises_over_training_passes_alone():
    loss = WarmUpLoss(2.0, warmup_iters=4)
    loss.eval()
    assert loss._weight() == 0
    with torch.no_grad():
        loss.train()._weight()
    assert [float(loss._weight()) for _ in range(6)] == [0, 0.5, 1, 1.5, 2, 2]


def test_resumes_where_it_was():
    loss, resumed = WarmUpLoss(1.0, 4), WarmUpLoss(1.0, 4)
    for _ in range(3):
        loss._weight()
    resumed.load_state_dict(loss.state_dict())
    assert resumed._weight() == 0.75


def test_without_warm_up_nothing_is_kept():
    loss = WarmUpLoss(0.5, 0)
    assert loss._weight() == 0.5 and not loss.state_dict()


@pytest.mark.parametrize(
    'args, name',
    [((-1, 0), 'loss_weight'), ((1, -1), 'warmup_iters'), ((float('nan'), 0), 'loss_weight')],
)
def test_negative_arguments_are_refused(args, name):
    with pytest.raises(ValueError, match=f'{name} must be 0 or more'):
        WarmUpLoss(*args)
