import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = {}
exec((ROOT / 'mmtoken' / 'version.py').read_text(), VERSION)

# The two OpenMMLab stacks install the same import names from different distributions. A hard
# dependency on either would overwrite the other's files, so both are extras.
ONEDL = [
    'onedl-mmengine>=0.10.12',
    'onedl-mmcv>=2.3.6',
    'onedl-mmdetection>=3.5.1',
    'onedl-mmsegmentation>=1.4.2',
    'onedl-mmpretrain>=1.3.6',
]
UPSTREAM = [
    'mmengine>=0.10.7',
    'mmcv>=2.1.0,<2.2.0',
    'mmdet==3.3.0',
    'mmsegmentation==1.2.2',
    'mmpretrain==1.2.0',
    'torch>=2.1,<2.6',  # mmengine 0.10.7 cannot read its checkpoints with later ones
    'torchvision>=0.16,<0.21',
    'ftfy',
    'regex',
    'numpy<2',
    'setuptools<82',
]


def place_mim_resources() -> None:
    """Let ``mmtoken/.mim`` lead to the configs, the tools and the model index.

    In the repository they are three symbolic links. Where git cannot make links (Windows, some
    network drives) or an archive was unpacked without them, they are text files. These are replaced
    by links, or else by copies, so that wheels and editable installs are the same everywhere.

    Raises:
        SystemExit: A file is missing, or cannot be written.
    """
    mim = ROOT / 'mmtoken' / '.mim'
    if not (ROOT / 'configs').exists() and (mim / 'configs').is_dir():
        return  # a source distribution, where .mim has the files themselves
    for name in ('configs', 'tools', 'model-index.yml'):
        source, place = ROOT / name, mim / name
        if source.exists() and place.exists() and place.samefile(source):
            continue
        try:
            _replace(place, source)
        except OSError as error:
            raise SystemExit(
                f'setup.py: cannot make {place} a link to {source}, nor a copy of it: {error}. '
                'This needs a complete and writable checkout, or one with symbolic links: '
                'git clone -c core.symlinks=true'
            ) from error


def _replace(place: Path, source: Path) -> None:
    """Make ``place`` a link to ``source``, or a copy where links are not supported."""
    source = source.resolve(strict=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)  # an earlier copy
    else:
        place.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(source, place.parent), place, source.is_dir())
    except OSError:
        print(f'setup.py: {place} becomes a copy; after changes in {source}, install again')
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy2(source, place)


place_mim_resources()

setup(
    name='mmtoken',
    version=VERSION['__version__'],
    description='Token-sparsified vision transformers for dense prediction in MMDetection and '
    'MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=[
        'computer vision',
        'vision transformer',
        'token reduction',
        'object detection',
        'semantic segmentation',
        'OpenMMLab',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmtoken', 'mmtoken.*']),
    entry_points={'console_scripts': ['mmtoken = mmtoken.cli:main']},
    # What is below mmtoken/.mim carries configs, tools and the model index into the wheel.
    package_data={'mmtoken': ['.mim/model-index.yml', '.mim/configs/**/*', '.mim/tools/**/*']},
    include_package_data=False,
    install_requires=['matplotlib', 'numpy', 'packaging', 'safetensors', 'timm>=1.0', 'torch>=2.1'],
    extras_require={
        'onedl': ONEDL,
        'upstream': UPSTREAM,
        'export': ['onnx', 'onnxruntime', 'onnxscript'],
        'tools': [
            'opencv-python',
            'pillow',
            'pycocotools',
            'pyyaml',
            'rich',
            'scikit-image',
            'scipy',
        ],
    },
    zip_safe=False,
)
