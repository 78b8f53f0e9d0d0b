"""Metafiles of the libraries, parsed once.

MMEngine parses all of them again for each ``mmdet::`` base, which takes a second a config.
"""

import functools

from mmengine.config import utils


def cache_metafiles() -> None:
    """Keep what was parsed, in this process."""
    if not hasattr(utils.load, 'cache_info'):
        utils.load = functools.cache(utils.load)
