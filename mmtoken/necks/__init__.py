"""Necks: restorations of dense maps, and the pyramid they end in.

A neck that restores tokens says in ``twin_type`` which neck takes maps in its place, and in
``restore_args`` which of its arguments that neck does not have; the dense twin of a config is made
with these. A neck that reduces tokens itself has ``twin_args``, like a backbone.
"""

from .grain_unpool import GrainUnpoolNeck
from .mixed_scale import MixedScaleNeck
from .semantic_recovery import SemanticRecoveryNeck
from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['GrainUnpoolNeck', 'MixedScaleNeck', 'SemanticRecoveryNeck', 'SimpleFeaturePyramid']
