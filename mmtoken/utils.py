"""What MMEngine's hub asks of a package, under the name by which it asks."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from .registry import MODELS

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def register_all_modules() -> None:
    """Let the models of our configs be built in the default scope ``mmtoken``.

    ``mmengine.hub.get_model('mmtoken::...')`` calls this, then builds in that scope, for it takes a
    config's package for its scope. But the models are detectors of mmdet, segmenters of mmseg and
    classifiers of mmpretrain, each made of parts that are to be looked for in its own library.
    """
    for library in LIBRARIES:
        if find_spec(library) is None:
            continue
        import_module(f'{library}.models')
        models = import_module(f'{library}.registry').MODELS.module_dict
        for name, model in models.items():
            whole = inspect.isclass(model) and issubclass(model, BaseModel)
            if whole and name not in MODELS.module_dict:
                MODELS.register_module(name, module=_in_scope(library, model))


def _in_scope(library: str, model: type[BaseModel]) -> Callable[..., BaseModel]:
    """A function that makes a model, and what it consists of, in the scope of its library."""

    def build(**settings) -> BaseModel:
        with DefaultScope.overwrite_default_scope(library):
            return model(**settings)

    return build
