"""``register_all_modules``, which MMEngine's hub imports from the ``utils`` of a package."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from .library import LIBRARIES
from .registry import MODELS


def register_all_modules() -> None:
    """Let the models of our configs be built in the default scope ``mmtoken``.

    ``mmengine.hub.get_model('mmtoken::...')`` calls this and builds in the scope of the config's
    package (mmengine 0.10.7, November 2026). But the models are detectors of mmdet, segmenters of
    mmseg and classifiers of mmpretrain, whose parts are in the registries of these libraries.
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
    """A function that builds a model, and its parts, in the scope of its library."""

    def build(**settings) -> BaseModel:
        with DefaultScope.overwrite_default_scope(library):
            return model(**settings)

    return build
