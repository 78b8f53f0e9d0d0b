import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmtoken
from mmtoken.runtime.aux_losses import is_collecting, publish, should_publish, token_losses


class Publisher(nn.Module):
    """Scales its input; publishes one loss and one statistic."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = x * self.scale
        if should_publish(self.training):
            publish(dict(loss_size=y.square().mean(), mean_ratio=y.mean()))
        return y


def test_losses_keep_their_graph_and_statistics_lose_it():
    model = Publisher()
    with mmtoken.token_losses() as published:
        y = model(torch.ones(4))
    assert dict(published) == dict(loss_size=torch.tensor(4.0), mean_ratio=torch.tensor(2.0))
    assert published['loss_size'].requires_grad and not published['mean_ratio'].requires_grad
    (y.sum() + published.total()).backward()
    assert model.scale.grad == 4 + 4


def test_a_name_published_twice_is_averaged():
    model = Publisher()
    with token_losses() as published:
        model(torch.ones(4))
        model(torch.full((2,), 3.0))
        publish(dict(loss_other=torch.tensor(1.0)))
    assert published['loss_size'] == (4 + 36) / 2 and published['mean_ratio'] == (2 + 6) / 2
    assert published.total() == 21
    published.total().backward()
    assert model.scale.grad == (2 * 2 + 2 * 2 * 9) / 2


def test_nothing_published():
    with token_losses() as published:
        pass
    assert not published and published.total() == 0 and published.total().shape == ()


def test_the_innermost_sink_receives():
    with token_losses() as outer:
        publish(dict(a=torch.tensor(1.0)))
        with token_losses() as inner:
            publish(dict(b=torch.tensor(2.0)))
        publish(dict(c=torch.tensor(3.0)))
    assert list(outer) == ['a', 'c'] and list(inner) == ['b']


def test_a_sink_closes_after_an_error():
    with pytest.raises(KeyError), token_losses():
        raise KeyError
    with pytest.raises(RuntimeError, match='TokenLossHook'):
        publish({})


@pytest.mark.parametrize('ask', [lambda: should_publish(True), lambda: publish({}), Publisher()])
def test_training_without_a_sink_is_an_error_that_helps(ask):
    with pytest.raises(RuntimeError) as error:
        ask(*[torch.ones(1)] * isinstance(ask, nn.Module))
    line = "default_hooks = dict(token_losses=dict(type='mmtoken.TokenLossHook'))"
    assert line in str(error.value) and 'custom_hooks would replace' in str(error.value)
    assert 'with mmtoken.token_losses() as' in str(error.value)


def test_nothing_is_asked_for_outside_of_training():
    model = Publisher().eval()
    model(torch.ones(4))
    with token_losses() as published:
        model(torch.ones(4))
        with torch.no_grad():
            model.train()(torch.ones(4))
            assert not should_publish(True)
    assert not published
    with torch.no_grad():
        publish(dict(loss=torch.tensor(1.0)))


def test_when_a_loss_would_be_trained():
    assert not is_collecting()
    recomputing = []

    def function(x):
        recomputing.append(is_collecting())
        return x.square()

    with token_losses():
        assert is_collecting()
        with torch.no_grad():
            assert not is_collecting()
        x = torch.ones(4, requires_grad=True)
        checkpoint(function, x, use_reentrant=False).sum().backward()
    assert recomputing == [True, False]


def test_a_sink_under_no_grad_takes_what_it_is_given():
    with torch.no_grad(), token_losses() as published:
        publish(dict(ratio=torch.tensor(0.5)))
    assert published['ratio'] == 0.5


@pytest.mark.parametrize('sink_in_backward', [False, True])
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_recomputation_publishes_nothing(use_reentrant, sink_in_backward):
    model = Publisher()
    x = torch.ones(4, requires_grad=True)
    with token_losses() as published:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    # Reentrant checkpoints run without gradients, so nothing that is made inside can be trained.
    assert list(published) == ([] if use_reentrant else ['loss_size', 'mean_ratio'])
    loss = y.sum() + published.total()
    if sink_in_backward:
        with token_losses() as late:
            loss.backward()
        assert not late
    else:
        loss.backward()
    assert model.calls == 2
    assert model.scale.grad == 4 + (0 if use_reentrant else 4)


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_publishing_itself_is_dropped_in_recomputation(use_reentrant):
    """Also by a module that does not ask first."""

    def function(x):
        publish(dict(ratio=x.mean()))
        return x.square()

    x = torch.ones(4, requires_grad=True)
    with token_losses() as published:
        checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    assert len(published._published['ratio']) == 1
    assert x.grad.eq(2).all()


@pytest.mark.parametrize('value, given', [(0.5, 'float'), (torch.ones(2), r'\(2,\)')])
def test_only_scalar_tensors(value, given):
    with token_losses(), pytest.raises(TypeError, match=f"'ratio' must be a tensor .* {given}"):
        publish(dict(ratio=value))
