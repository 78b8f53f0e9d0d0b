import pytest
from mmengine.registry import HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_our_types_are_found_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name in ('STViTRSwin', 'MixedScaleNeck', 'BudgetLoss'):
            assert MODELS.get(f'mmtoken.{name}').__name__ == name
        assert METRICS.get('mmtoken.BoundaryIoUMetric').__name__ == 'BoundaryIoUMetric'
        for name in ('TokenLossHook', 'TwinDistillHook'):
            assert HOOKS.get(f'mmtoken.{name}').__name__ == name
        name = 'LayerDecayOptimWrapperConstructor'
        assert OPTIM_WRAPPER_CONSTRUCTORS.get(f'mmtoken.{name}').__name__ == name
