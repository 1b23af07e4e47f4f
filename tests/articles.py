"""Sources and targets for what composes images of articles, and what is wrong with them."""

import gzip

import numpy as np

IMAGES = 't10k-images-idx3-ubyte.gz'
LABELS = 't10k-labels-idx1-ubyte.gz'


def write_source(folder, count):
    """Writes a source of the given number of articles, all plain squares of class 0."""
    folder.mkdir()
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 6:22, 6:22] = 200
    header = b''.join(size.to_bytes(4, 'big') for size in images.shape)
    (folder / IMAGES).write_bytes(gzip.compress(b'\0\0\x08\x03' + header + images.tobytes()))
    (folder / LABELS).write_bytes(gzip.compress(b'\0\0\x08\x01' + count.to_bytes(4, 'big') + bytes(count)))
    return folder


def read_tree(folder):
    """Returns the bytes of every file below a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# What makes the arguments that follow the target ``out`` in a folder


def missing_source(folder):
    return ['--source', folder / 'nowhere']


def folder_not_empty(folder):
    (folder / 'out').mkdir()
    (folder / 'out/images').write_text('precious')
    return []


def folder_of_something_else(folder):
    (folder / 'out').mkdir()
    (folder / 'out/thesis.txt').write_text('precious')
    return ['--overwrite']


def file_in_place_of_folder(folder):
    (folder / 'out').write_text('precious')
    return ['--overwrite']


BAD_FOLDERS = [
    (folder_not_empty, 'is not empty; name another folder, or pass --overwrite'),
    (folder_of_something_else, 'holds thesis.txt, which --overwrite would delete'),
    (file_in_place_of_folder, 'not a folder'),
]
