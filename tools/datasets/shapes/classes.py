"""The classes of Shapes, numbered as in ADE20K's list of 150 scene classes."""

UNLABELLED_ID = 0
WALL_ID = 1

CLASS_IDS = {
    'lamp': 37,
    'box': 42,
    'bottle': 99,
    'ball': 120,
    'fan': 140,
    'plate': 143,
    'clock': 149,
    'flag': 150,
}
