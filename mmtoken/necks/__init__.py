"""Necks: restorations of dense maps, and the pyramid they end in.

For the dense twin of a config, ``twin_type`` of a neck that restores tokens is the neck that takes
maps in its place. A neck that reduces tokens itself has ``twin_args``, as backbones do.
"""

from .grain_unpool import GrainUnpoolNeck
from .mixed_scale import MixedScaleNeck
from .semantic_recovery import SemanticRecoveryNeck
from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['GrainUnpoolNeck', 'MixedScaleNeck', 'SemanticRecoveryNeck', 'SimpleFeaturePyramid']
