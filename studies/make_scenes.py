"""Composes Fashion-MNIST articles into scenes with boxes, instance masks and semantic maps.

The output has ADE20K's layout for images and semantic maps, and COCO's format for instances:

    OUT/images/{training,validation}/00000.jpg
    OUT/annotations/{training,validation}/00000.png    0 is background, 1 to 10 are the classes
    OUT/annotations/instances_{training,validation}.json

Training and validation scenes use different articles. Scene number i depends on the seed, the size and the
articles, not on the number of scenes.
"""

import argparse
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from mmdenoiserep.core.files.atomic import check_folder, write_folder

CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
SPLITS = ('training', 'validation')
SOURCE = Path(__file__).resolve().parents[1] / 'demo' / 'fashion-mnist'
MAX_ARTICLES = 4
SIDES = (36, 64)
MIN_VISIBLE = 0.4
VALIDATION_SHARE = 0.2
FOREGROUND = 16


def read_idx(path):
    """Reads a gzipped idx file of bytes.

    Args:
        path (Path): The file.

    Returns:
        numpy.ndarray: The array, uint8, of the shape that the header gives.

    Raises:
        ValueError: The file is missing, damaged, or not an idx file of bytes.
    """
    import numpy as np

    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f'{path} is missing.') from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} cannot be read: {error}.') from None
    start = 4 + 4 * data[3] if len(data) > 3 else 4
    if data[:3] != b'\0\0\x08' or len(data) < start:
        raise ValueError(f'{path} is not an idx file of bytes.')
    shape = [int.from_bytes(data[i : i + 4], 'big') for i in range(4, start, 4)]
    if math.prod(shape) != len(data) - start:
        raise ValueError(f'{path} does not hold the {shape} bytes that its header promises.')
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_articles(source):
    """Reads the articles, except nearly empty ones.

    Args:
        source (Path): Folder with the two files of Fashion-MNIST's test split.

    Returns:
        tuple: Articles of shape (N, H, W), uint8, and their labels 0 to 9 of shape (N,), uint8.

    Raises:
        ValueError: A file can't be read, or images and labels do not match.
    """
    images = read_idx(source / 't10k-images-idx3-ubyte.gz')
    labels = read_idx(source / 't10k-labels-idx1-ubyte.gz')
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels >= len(CLASSES)).any():
        raise ValueError(f'the images and labels in {source} do not belong together.')
    usable = (images > FOREGROUND).mean(axis=(1, 2)) > 0.05
    return images[usable], labels[usable]


def split_articles(count, seed):
    """Splits the articles into training and validation.

    Args:
        count (int): Number of articles.
        seed (int): Seed, 0 or more.

    Returns:
        tuple: Disjoint indices of the training and the validation articles, two int64 arrays.
    """
    import numpy as np

    order = np.random.default_rng([seed, 0]).permutation(count)
    cut = int(count * VALIDATION_SHARE)
    return np.sort(order[cut:]), np.sort(order[:cut])


def make_background(size, rng):
    """Draws a smooth random texture.

    Args:
        size (int): Side of the scene.
        rng (numpy.random.Generator): Source of randomness.

    Returns:
        numpy.ndarray: Colours of shape (size, size, 3), float32, about 50 to 170.
    """
    import cv2
    import numpy as np

    colours = rng.uniform(70, 150, (3, 3, 3)).astype(np.float32)
    ripples = rng.normal(0, 4, (size // 6, size // 6)).astype(np.float32)
    colours = cv2.resize(colours, (size, size), interpolation=cv2.INTER_CUBIC)
    return colours + cv2.resize(ripples, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def cut_out(article, side):
    """Enlarges an article and computes its filled outline.

    Args:
        article (numpy.ndarray): Grey image of shape (H, W), uint8, on black.
        side (int): Side of the result.

    Returns:
        tuple: Brightness and opacity, each of shape (side, side), float32, 0 to 1.
    """
    import cv2
    import numpy as np

    contours, _ = cv2.findContours((article > FOREGROUND).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(article), contours, -1, 255, cv2.FILLED)
    layers = np.stack([article, filled], -1).astype(np.float32) / 255
    layers = cv2.resize(layers, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    return layers[..., 0], layers[..., 1]


def compose_scene(images, labels, size, rng):
    """Composes one scene.

    Args:
        images (numpy.ndarray): Articles to choose from, shape (N, H, W), uint8.
        labels (numpy.ndarray): Their labels 0 to 9, shape (N,), uint8.
        size (int): Side of the scene.
        rng (numpy.random.Generator): Source of randomness.

    Returns:
        tuple: The scene of shape (size, size, 3), uint8, and a list with the label (int) and the visible mask
            (shape (size, size), bool) of each article. The masks do not overlap.
    """
    import numpy as np

    scene = make_background(size, rng)
    layers = []
    for choice in rng.choice(len(images), rng.integers(1, MAX_ARTICLES + 1), replace=False):
        side = int(rng.integers(SIDES[0], SIDES[1] + 1))
        top, left = rng.integers(0, size - side + 1, 2)
        brightness, opacity = np.zeros((2, size, size), np.float32)
        area = np.s_[top : top + side, left : left + side]
        brightness[area], opacity[area] = cut_out(images[choice], side)
        tint = rng.uniform(0.6, 1, 3).astype(np.float32)
        colour = (40 + 215 * brightness[..., None]) * (tint / tint.max())
        layers.append((int(labels[choice]), colour, opacity))

    covered = np.zeros((size, size), bool)
    kept = []
    for label, colour, opacity in reversed(layers):
        mask = opacity > 0.5
        visible = mask & ~covered
        if visible.sum() >= MIN_VISIBLE * mask.sum():
            covered |= mask
            kept.insert(0, (label, visible, colour, opacity[..., None]))
    for _, _, colour, opacity in kept:
        scene = scene * (1 - opacity) + colour * opacity
    return scene.clip(0, 255).astype(np.uint8), [(label, visible) for label, visible, _, _ in kept]


def write_image(path, image):
    """Writes an image.

    Args:
        path (Path): The file; its suffix sets the format.
        image (numpy.ndarray): Shape (H, W) or (H, W, 3), uint8.

    Raises:
        OSError: The file can't be written.
    """
    import cv2

    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def write_split(out, split, count, images, labels, size, seed):
    """Writes the scenes and annotations of one split.

    Args:
        out (Path): Output folder.
        split (str): 'training' or 'validation'.
        count (int): Number of scenes.
        images (numpy.ndarray): The split's articles, shape (N, H, W), uint8.
        labels (numpy.ndarray): Their labels 0 to 9, shape (N,), uint8.
        size (int): Side of the scenes.
        seed (int): Seed, 0 or more.
    """
    import numpy as np
    from pycocotools import mask as coco_mask
    from tqdm import tqdm

    for kind in ('images', 'annotations'):
        (out / kind / split).mkdir(parents=True)
    categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)]
    coco: dict[str, Any] = {'images': [], 'annotations': [], 'categories': categories}
    for index in tqdm(range(count), desc=split, unit='scene'):
        rng = np.random.default_rng([seed, 1 + SPLITS.index(split), index])
        scene, articles = compose_scene(images, labels, size, rng)
        semantic = np.zeros((size, size), np.uint8)
        for label, visible in articles:
            semantic[visible] = label + 1
            rle = coco_mask.encode(np.asfortranarray(visible, np.uint8))
            annotation = {
                'id': len(coco['annotations']) + 1,
                'image_id': index,
                'category_id': label + 1,
                'bbox': coco_mask.toBbox(rle).tolist(),
                'area': int(visible.sum()),
                'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
                'iscrowd': 0,
            }
            coco['annotations'].append(annotation)
        coco['images'].append({'id': index, 'file_name': f'{index:05d}.jpg', 'width': size, 'height': size})
        write_image(out / 'images' / split / f'{index:05d}.jpg', scene)
        write_image(out / 'annotations' / split / f'{index:05d}.png', semantic)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def check_arguments(args):
    """Checks the arguments.

    Args:
        args (argparse.Namespace): The parsed command line.

    Returns:
        str: The first error as one sentence; empty if there is none.
    """
    if args.train < 1 or args.val < 1:
        return 'each split needs at least one scene.'
    if args.size < SIDES[1]:
        return f'--size {args.size} is too small, articles take up to {SIDES[1]} pixels.'
    if args.seed < 0:
        return '--seed must not be negative.'
    return ''


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description='Composes Fashion-MNIST articles into scenes with annotations.')
    parser.add_argument('out', metavar='OUT', type=Path, help='output folder')
    parser.add_argument('--train', type=int, default=1000, help='number of training scenes (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='number of validation scenes (default: %(default)s)')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed, 0 or more (default: %(default)s)')
    parser.add_argument('--source', type=Path, default=SOURCE, help='folder of Fashion-MNIST (default: that in demo)')
    parser.add_argument('--overwrite', action='store_true', help='replace the scenes in OUT')
    args = parser.parse_args()
    args.out = args.out.resolve()

    check_folder(args.out, lambda path: path.name in ('images', 'annotations'), args.overwrite)
    try:
        if problem := check_arguments(args):
            raise ValueError(problem)
        images, labels = read_articles(args.source)
        parts = split_articles(len(images), args.seed)
        if min(len(part) for part in parts) < MAX_ARTICLES:
            raise ValueError(f'{args.source} has too few articles, each split needs {MAX_ARTICLES} or more.')
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None

    with write_folder(args.out) as new:
        for split, count, part in zip(SPLITS, (args.train, args.val), parts, strict=True):
            write_split(new, split, count, images[part], labels[part], args.size, args.seed)


if __name__ == '__main__':
    launch(main)
