"""Writes Fashion-MNIST in the layout of mmpretrain's data set class: four uncompressed idx files.

A source with both splits, such as Debian's package dataset-fashion-mnist (60,000 and 10,000 images), keeps them. If the
source has only the test split, such as the one in demo, its first 8,000 images are for training and the others for
testing.
"""

import argparse
from pathlib import Path

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from mmdenoiserep.core.files.atomic import check_folder, write_folder
from studies.make_scenes import CLASSES, SOURCE, read_idx

DEBIAN = Path('/usr/share/datasets/fashion-mnist')
TRAINING = 8000


def read_split(source, split):
    """Reads one split.

    Args:
        source (Path): Folder with the gzipped files of Fashion-MNIST.
        split (str): 'train' or 't10k'.

    Returns:
        tuple: Images of shape (N, H, W) and labels 0 to 9 of shape (N,), both uint8.

    Raises:
        ValueError: A file can't be read, or images and labels do not match.
    """
    images = read_idx(source / f'{split}-images-idx3-ubyte.gz')
    labels = read_idx(source / f'{split}-labels-idx1-ubyte.gz')
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels >= len(CLASSES)).any():
        raise ValueError(f'the {split} images and labels in {source} do not belong together.')
    return images, labels


def read_source(source):
    """Reads both splits, or makes them from the test split.

    Args:
        source (Path): Folder with the gzipped files of both splits, or of the test split alone.

    Returns:
        dict: Images and labels of 'train' and 't10k', as :func:`read_split` returns them.

    Raises:
        ValueError: A file can't be read, or a split lacks a class.
    """
    import numpy as np

    images, labels = read_split(source, 't10k')
    if (source / 'train-images-idx3-ubyte.gz').exists():
        splits = {'train': read_split(source, 'train'), 't10k': (images, labels)}
    else:
        splits = {'train': (images[:TRAINING], labels[:TRAINING]), 't10k': (images[TRAINING:], labels[TRAINING:])}
    for split, (_, labels) in splits.items():
        if missing := sorted(set(range(len(CLASSES))) - set(np.unique(labels).tolist())):
            raise ValueError(f'the {split} split of {source} has no image of {CLASSES[missing[0]]}.')
    return splits


def write_idx(path, array):
    """Writes an idx file of bytes.

    Args:
        path (Path): The file.
        array (numpy.ndarray): Any shape, uint8.
    """
    header = b''.join(size.to_bytes(4, 'big') for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + header + array.tobytes())


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'out',
        metavar='OUT',
        type=Path,
        nargs='?',
        default=Path('work_dirs/fashion-mnist'),
        help='output folder (default: %(default)s)',
    )
    parser.add_argument(
        '--source',
        type=Path,
        default=DEBIAN if DEBIAN.is_dir() else SOURCE,
        help=f'folder of Fashion-MNIST (default: {DEBIAN} where it is installed, else that in demo)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the files in OUT')
    args = parser.parse_args()

    names = {f'{split}-{part}-ubyte' for split in ('train', 't10k') for part in ('images-idx3', 'labels-idx1')}
    check_folder(args.out, lambda path: path.name in names, args.overwrite)
    try:
        splits = read_source(args.source)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    with write_folder(args.out) as new:
        for split, (images, labels) in splits.items():
            write_idx(new / f'{split}-images-idx3-ubyte', images)
            write_idx(new / f'{split}-labels-idx1-ubyte', labels)

    print(f'{args.out}, from {args.source}:')
    for split, (images, labels) in splits.items():
        counts = [int((labels == label).sum()) for label in range(len(CLASSES))]
        print(f'{split}: {len(images)} images, {min(counts)} to {max(counts)} of each of {len(counts)} classes')


if __name__ == '__main__':
    launch(main)
