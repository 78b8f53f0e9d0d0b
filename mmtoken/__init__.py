"""Token-sparsified vision transformers for dense prediction in OpenMMLab.

Importing this package registers nothing and loads no torch: configs name our modules with the
prefix ``mmtoken.``, and MMEngine's registries find them through :mod:`mmtoken.registry` when a
model is built. The import does two things only: it refuses installations that are known not to
work, and it lets MMEngine resolve ``mmtoken::`` and ``mmseg::`` config paths. The public functions
below load what they need when they are first asked for.
"""

from importlib import import_module

from .stack import check_stack, enable_config_paths
from .version import __version__

check_stack()
enable_config_paths()

_FUNCTIONS = dict(
    create_model='mmtoken.models',
    dense_twin='mmtoken.analysis.twin',
    follow_image_sizes='mmtoken.engine.image_sizes',
    list_models='mmtoken.models',
    optimize_for_cpu='mmtoken.fast',
    routing_override='mmtoken.runtime.routing_override',
    set_budget='mmtoken.runtime.budget',
    set_image_sizes='mmtoken.layers.common.padding',
    set_label_maps='mmtoken.layers.common.labels',
    token_losses='mmtoken.runtime.aux_losses',
)

__all__ = ['__version__', *_FUNCTIONS]


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
