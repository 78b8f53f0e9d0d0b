import pytest
import torch

from mmtoken.tokens.plan import MAX_PLANS, cached_plan


@pytest.fixture
def plan():
    return cached_plan(torch.arange)


def test_plans_are_cached_and_bounded(plan):
    assert plan(3) is plan(3)
    for i in range(2 * MAX_PLANS):
        plan(i)
    assert plan.cache_info().currsize == MAX_PLANS


def test_plans_serve_autograd_and_the_cpu(plan):
    """Whatever mode and default device they were made under."""
    with torch.inference_mode(), torch.device('meta'):
        result = plan(3)
    assert not result.is_inference() and result.device.type == 'cpu'
