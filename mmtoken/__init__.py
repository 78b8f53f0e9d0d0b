"""Token-sparsified vision transformers for dense prediction in OpenMMLab.

Importing this package registers nothing and loads no torch: configs name our modules with the
prefix ``mmtoken.``, and MMEngine's registries find them through :mod:`mmtoken.registry` when a
model is built. The import does two things only: it refuses installations that are known not to
work, and it lets MMEngine resolve ``mmtoken::`` and ``mmseg::`` config paths.
"""

from .stack import check_stack, enable_config_paths
from .version import __version__

check_stack()
enable_config_paths()

__all__ = ['__version__']
