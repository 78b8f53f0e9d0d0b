"""Shapes: a small drawn data set with the file layouts of COCO and of ADE20K."""

from .build import check_arguments, make_dataset
from .classes import CLASS_IDS, UNLABELLED_ID, WALL_ID

__all__ = ['CLASS_IDS', 'UNLABELLED_ID', 'WALL_ID', 'check_arguments', 'make_dataset']
