"""Takes from a real Python what FAKE_MISSING lists, and supplies the rest."""

import ctypes
import os
import sys
import sysconfig

MISSING = os.environ.get('FAKE_MISSING', '').split()
OPENCV_LIBRARIES = ('libGL.so.1', 'libgthread-2.0.so.0')
load_library = ctypes.CDLL
get_path = sysconfig.get_path


def fake_load_library(name, *args, **kwargs):
    if name in MISSING:
        raise OSError(name)
    if name not in OPENCV_LIBRARIES:
        return load_library(name, *args, **kwargs)


def fake_get_path(name, *args, **kwargs):
    if name != 'include':
        return get_path(name, *args, **kwargs)
    return '/nowhere' if 'headers' in MISSING else os.environ['FAKE_HEADERS']


ctypes.CDLL = fake_load_library
sysconfig.get_path = fake_get_path
if version := os.environ.get('FAKE_VERSION'):
    sys.version_info = tuple(map(int, version.split('.')))
