"""Packaging of mmdenoiserep."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name='mmdenoiserep',
    version='0.1.0',
    description='DenoiseRep for OpenMMLab: train linear denoisers on a backbone, fold them into its weights',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license_expression='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmdenoiserep*']),
    install_requires=['torch>=2.6'],
    extras_require={
        'mm': ['mmengine>=0.10.5', 'mmcv>=2.0.1'],
        'reid': ['mmengine>=0.10.5', 'mmcv>=2.0.1', 'mmpretrain>=1.2.0', 'h5py', 'scipy'],
    },
)
