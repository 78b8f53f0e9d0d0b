"""Necks: they restore dense maps and build a feature pyramid.

A neck that restores tokens declares in ``twin_type`` the neck for maps that replaces it in the
dense twin of a config. A neck that reduces tokens itself has ``twin_args``, like a backbone.
"""

from .grain_unpool import GrainUnpoolNeck
from .mixed_scale import MixedScaleNeck
from .semantic_recovery import SemanticRecoveryNeck
from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['GrainUnpoolNeck', 'MixedScaleNeck', 'SemanticRecoveryNeck', 'SimpleFeaturePyramid']
