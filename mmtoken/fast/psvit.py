"""PSViT's blocks, tile by tile."""

from ..layers.psvit.sharing import SharedMapBlock
from .tiling import tiled
from .vit import TiledViTBlock


@tiled
class TiledSharedMapBlock(SharedMapBlock, TiledViTBlock):
    """:class:`~mmtoken.layers.psvit.sharing.SharedMapBlock` for CPU inference."""
