"""Lets a PyPI torchvision be imported beside a CPU-only torch.

The PyPI wheel of torchvision is built against CUDA. Beside a CPU-only torch its compiled library does not load, and the
import then stops at ``operator torchvision::nms does not exist``, because the fake kernels of two operators are
registered by name. Declaring the two schemas first is enough: transforms and models work, torchvision's own compiled
operators stay unusable (mmcv brings those that detection needs).

``requirements/install.sh`` copies this file into the virtual environment, beside a ``.pth`` that imports it at
start-up, and only where ``import torchvision`` fails. It does nothing until torchvision is really imported.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)


class _DeclareOperatorsFirst(MetaPathFinder):
    """Declares torchvision's operators at the moment torchvision is looked for, then lets the import go on."""

    def find_spec(self, fullname, path, target=None):
        if fullname == 'torchvision':
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library('torchvision', 'DEF')
            for schema in SCHEMAS:
                self.library.define(schema)
            torch.torchvision_repair = self  # the schemas live as long as this object
        return None


sys.meta_path.insert(0, _DeclareOperatorsFirst())
