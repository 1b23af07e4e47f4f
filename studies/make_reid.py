"""Renders Fashion-MNIST articles with several virtual cameras: a small data set for re-identification.

One article is one identity. The output has the layout of Market-1501, so its class reads it unchanged:

    OUT/{bounding_box_train,query,bounding_box_test}/0002_c1s1_000451_03.jpg

The name has identity, camera, sequence (always 1), number of the article in Fashion-MNIST, and number of the image.
Training, testing and distractors (identity 0, in the gallery only) use different articles. Each camera has its own
background, position and size of the article, colours, exposure and blur; images vary a little in addition. Cameras and
images depend on the seed, the size and the articles, not on the number of images.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from mmdenoiserep.core.files.atomic import check_folder, write_folder
from studies.make_scenes import SOURCE, cut_out, make_background, read_articles, write_image

FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')
DISTRACTORS = 25
MIN_HEIGHT = 32


class Camera(NamedTuple):
    """Properties of all images of a camera."""

    background: Any
    """Background, (2 height, 2 height, 3), float32; an image shows a part of it."""
    size: float
    """Side of the article over the width of the image."""
    shift: Any
    """Offset of the article from the centre, (x, y), over the width of the image."""
    angle: float
    """Degrees, counter-clockwise."""
    cast: Any
    """Factor on blue, green and red."""
    contrast: float
    """Factor on the difference from middle grey."""
    brightness: float
    """Value that is added, for values from 0 to 255."""
    blur: float
    """Standard deviation in pixels for an image of height 64."""


def make_camera(height, rng):
    """Draws a random camera.

    Args:
        height (int): Height of its images.
        rng (numpy.random.Generator): Source of randomness.

    Returns:
        Camera: The camera.
    """
    return Camera(
        background=make_background(2 * height, rng),
        size=rng.uniform(0.75, 1.15),
        shift=rng.uniform(-0.12, 0.12, 2),
        angle=rng.uniform(-15, 15),
        cast=rng.uniform(0.6, 1.2, 3),
        contrast=rng.uniform(0.5, 1.2),
        brightness=rng.uniform(-40, 40),
        blur=rng.uniform(0.3, 1.5),
    )


def take_image(article, tint, camera, height, rng):
    """Renders an article with a camera.

    Args:
        article (numpy.ndarray): Grey image of shape (H, W), uint8, on black.
        tint (numpy.ndarray): Colour of the article, shape (3,), 0 to 1.
        camera (Camera): The camera.
        height (int): Height of the image; its width is three quarters of that.
        rng (numpy.random.Generator): Source of randomness.

    Returns:
        numpy.ndarray: Image of shape (height, 3 height / 4, 3), uint8.
    """
    import cv2
    import numpy as np

    width = 3 * height // 4
    brightness, opacity = cut_out(article, height)
    layers = np.stack([brightness, opacity], -1)
    scale = camera.size * rng.uniform(0.9, 1.1) * width / height
    angle = camera.angle + rng.uniform(-8, 8)
    middle = np.array([width, height]) / 2 + (camera.shift + rng.uniform(-0.06, 0.06, 2)) * width
    place = cv2.getRotationMatrix2D((height / 2, height / 2), angle, scale)
    place[:, 2] += middle - height / 2
    layers = cv2.warpAffine(layers, place, (width, height), flags=cv2.INTER_LINEAR)

    top, left = rng.integers(0, height, 2)
    image = camera.background[top : top + height, left : left + width]
    opacity = layers[..., 1:]
    image = image * (1 - opacity) + (40 + 215 * layers[..., :1]) * tint * opacity
    image = (image * camera.cast - 128) * camera.contrast + 128 + camera.brightness + rng.uniform(-12, 12)
    image = cv2.GaussianBlur(image, (0, 0), camera.blur * height / 64)
    return image.clip(0, 255).astype(np.uint8)


def plan_images(order, args):
    """Lists the images of each folder.

    Args:
        order (numpy.ndarray): Numbers of the articles in random order, shape (N,).
        args (argparse.Namespace): The parsed command line.

    Returns:
        dict: For each folder, tuples of identity, number of the article, camera from 0, and number of the image.
    """
    people = [int(article) for article in order[: args.ids + args.test_ids + DISTRACTORS]]
    train = list(enumerate(people[: args.ids], 1))
    test = list(enumerate(people[args.ids : args.ids + args.test_ids], args.ids + 1))
    distractors = [(0, article) for article in people[args.ids + args.test_ids :]]
    shots = {
        'bounding_box_train': [(train, range(args.per_camera))],
        'query': [(test, range(1))],
        'bounding_box_test': [(distractors, range(1)), (test, range(1, 1 + args.per_camera))],
    }
    return {
        folder: [
            (pid, article, camera, number)
            for identities, numbers in parts
            for pid, article in identities
            for camera in range(args.cameras)
            for number in numbers
        ]
        for folder, parts in shots.items()
    }


def write_images(folder, images, articles, size, seed):
    """Writes the images of a folder.

    Args:
        folder (Path): The folder to create.
        images (list): Its images, as :func:`plan_images` returns them.
        articles (numpy.ndarray): All articles, shape (N, H, W), uint8.
        size (int): Height of the images.
        seed (int): Seed, 0 or more.
    """
    import numpy as np
    from tqdm import tqdm

    cameras = {number: make_camera(size, np.random.default_rng([seed, 1, number])) for number in {i[2] for i in images}}
    folder.mkdir(parents=True)
    for pid, article, camera, number in tqdm(images, desc=folder.name, unit='image'):
        tint = np.random.default_rng([seed, 2, article]).uniform(0.6, 1, 3)
        rng = np.random.default_rng([seed, 3, article, camera, number])
        image = take_image(articles[article], tint / tint.max(), cameras[camera], size, rng)
        write_image(folder / f'{pid:04d}_c{camera + 1}s1_{article:06d}_{number:02d}.jpg', image)


def check_arguments(args):
    """Checks the arguments.

    Args:
        args (argparse.Namespace): The parsed command line.

    Returns:
        str: The first error as one sentence; empty if there is none.
    """
    if args.ids < 1 or args.test_ids < 1:
        return 'training and testing need at least one identity each.'
    if not 2 <= args.cameras <= 9:
        return f'--cameras {args.cameras} does not work, a query needs another camera and a name has one digit: 2 to 9.'
    if args.per_camera < 1:
        return 'each camera needs at least one image of an identity.'
    if args.size < MIN_HEIGHT:
        return f'--size {args.size} is too small, images are {MIN_HEIGHT} pixels high or more.'
    if args.seed < 0:
        return '--seed must not be negative.'
    return ''


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', metavar='OUT', type=Path, help='output folder')
    parser.add_argument('--ids', type=int, default=500, help='training identities (default: %(default)s)')
    parser.add_argument('--test-ids', type=int, default=200, help='other identities to test (default: %(default)s)')
    parser.add_argument('--cameras', type=int, default=4, help='number of cameras, 2 to 9 (default: %(default)s)')
    parser.add_argument(
        '--per-camera',
        type=int,
        default=2,
        help='images of an identity from each camera, in training and in the gallery; a query is one more '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--size', type=int, default=64, help='height of the images, 3/4 of it is the width (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed, 0 or more (default: %(default)s)')
    parser.add_argument('--source', type=Path, default=SOURCE, help='folder of Fashion-MNIST (default: that in demo)')
    parser.add_argument('--overwrite', action='store_true', help='replace the images in OUT')
    args = parser.parse_args()
    args.out = args.out.resolve()

    import numpy as np

    check_folder(args.out, lambda path: path.name in FOLDERS, args.overwrite)
    try:
        if problem := check_arguments(args):
            raise ValueError(problem)
        articles, _ = read_articles(args.source)
        needed = args.ids + args.test_ids + DISTRACTORS
        if len(articles) < needed:
            raise ValueError(f'{args.source} has {len(articles)} articles, {needed} are needed.')
        plan = plan_images(np.random.default_rng([args.seed, 0]).permutation(len(articles)), args)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None

    with write_folder(args.out) as new:
        for folder, images in plan.items():
            write_images(new / folder, images, articles, args.size, args.seed)


if __name__ == '__main__':
    launch(main)
