import pytest
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_our_types_are_found_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        for name in ('STViTRSwin', 'MixedScaleNeck', 'BudgetLoss'):
            assert MODELS.get(f'mmtoken.{name}').__name__ == name
        for name in ('TokenLossHook', 'TwinDistillHook'):
            assert HOOKS.get(f'mmtoken.{name}').__name__ == name
        name = 'LayerDecayOptimWrapperConstructor'
        assert OPTIM_WRAPPER_CONSTRUCTORS.get(f'mmtoken.{name}').__name__ == name
