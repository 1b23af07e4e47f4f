"""Prints the versions that a bug report needs: ``python -m mmdenoiserep.info``."""

import sys
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

import torch
from torch.utils import collect_env

from . import __version__

MODULES = ('torchvision', 'cv2', 'mmengine', 'mmcv', 'mmcv.ops', 'mmdet', 'mmseg', 'mmpretrain')
"""What may be installed and fail at import, for example compiled for another torch."""
PACKAGES = ('greenlet', 'numpy', 'setuptools', 'albumentations', 'scikit-learn', 'tensorboard', 'onnx', 'onnxruntime')
"""What only needs the right version; not imported."""


def collect_info() -> dict[str, str]:
    """Collects the versions of the system, of torch and of the libraries; needs torch alone.

    Returns:
        By name, in the order to print: the version; ``'not installed'`` or ``'none'`` for what is missing; also the
        error for a library that does not import.
    """
    run = collect_env.run
    cuda = f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}' if torch.version.cuda else 'no CUDA'
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    distributions = packages_distributions()
    return {
        'system': collect_env.get_os(run) or sys.platform,
        'python': sys.version.replace('\n', ''),
        'mmdenoiserep': __version__,
        'torch': f'{torch.__version__}, built with {cuda}',
        'GPU': ', '.join(gpus) or 'none',
        'NVIDIA driver': collect_env.get_nvidia_driver_version(run) or 'none',
        'nvcc': collect_env.get_running_cuda_version(run) or 'none',
        'gcc': collect_env.get_gcc_version(run) or 'none',
        **{name: _describe_module(name, distributions) for name in MODULES},
        **{name: _describe_package(name) for name in PACKAGES},
    }


def _describe_module(name: str, distributions: dict[str, list[str]]) -> str:
    """Returns the packages that provide a module with their versions, for mmcv's operators what compiled them."""
    root = name.partition('.')[0]
    if not find_spec(root):
        return 'not installed'
    packages = ', '.join(f'{package} {version(package)}' for package in sorted(set(distributions.get(root, []))))
    try:
        module = import_module(name)
    except Exception as error:
        return f'{packages or "installed"}, does not import: {type(error).__name__}: {error}'
    if name == 'mmcv.ops':
        return f'compiled by {module.get_compiler_version()}, CUDA {module.get_compiling_cuda_version()}'
    return packages or f'installed without metadata, version {getattr(module, "__version__", "unknown")}'


def _describe_package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return 'not installed'


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    for key, value in collect_info().items():
        print(f'{key}: {value}')
