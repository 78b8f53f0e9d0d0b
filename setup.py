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
    'ftfy',
    'regex',
    'numpy<2',
    'setuptools<82',
]

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
    # The symlinks below mmtoken/.mim carry configs, tools and the model index into the wheel.
    package_data={'mmtoken': ['.mim/model-index.yml', '.mim/configs/**/*', '.mim/tools/**/*']},
    include_package_data=False,
    install_requires=['torch>=2.1', 'timm>=1.0', 'rich'],
    extras_require={'onedl': ONEDL, 'upstream': UPSTREAM},
    zip_safe=False,
)
