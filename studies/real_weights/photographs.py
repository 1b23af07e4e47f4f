"""Gathers photographs from packages, splits them into source, fit and test, and cuts crops from them.

Debian packages, which are downloaded and unpacked but not installed, with the number of photographs in Debian 12 and
their licences (in the ``copyright`` file of the package where no other file is named):

* ``gcompris-qt-data``: 100 of animals and monuments; CC BY, CC BY-SA, CC0, GFDL, GPL-3+, public domain
* ``lomiri-wallpapers-16.04``: 13; CC BY, CC BY-SA, CC0
* ``mate-backgrounds``: 12 of nature; GPL-2+, CC BY-SA
* ``palapeli-data``: 5; GFDL, public domain (in the ``.desktop`` files beside them)

Python packages, of the extra ``real-weights``: scikit-image with 5 and scikit-learn with 2 photographs.

Run ``python -m studies.real_weights.photographs`` to gather them. ``apt-get download`` needs no root, but an up-to-date
package list, which ``apt-get update`` gets.
"""

import argparse
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from denoiserep_commands import launch
from mmdenoiserep.core import InputError
from mmdenoiserep.core.files.atomic import write_folder
from studies.real_weights.packages import debian_package, python_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FOLDER = Path('work_dirs/photographs')
SHORTER_SIDE = 512
"""Larger photographs are reduced to this, in pixels."""
DEBIAN = {
    'gcompris-qt-data': [
        f'usr/share/gcompris-qt/rcc/{name}.rcc'
        for name in ('erase', 'explore_farm_animals', 'explore_monuments', 'explore_world_animals')
    ],
    'lomiri-wallpapers-16.04': [
        f'usr/share/backgrounds/{name}.jpg'
        for name in (
            'Bridge_by_Sander_Klootwijk',
            'Dragonfly_by_Bolly',
            'Picture_0B_by_freespace',
            'Picture_1A_by_freespace',
            'Wine_by_Jakkub_Mede',
            'aitzgorri_by_Aitzol_Berasategi',
            'free_by_Peter_Nerlich',
            'friends_by_Aitzol_Berasategi',
            'greentock_by_Peter_Nerlich',
            'life_by_Aitzol_Berasategi',
            'picosdeeuropa_by_Aitzol_Berasategi',
            'seeding_by_Clements_Engelhardt',
            'sunset_by_Aitzol_Berasategi',
        )
    ],
    'mate-backgrounds': ['usr/share/backgrounds/mate/nature/*.jpg'],
    'palapeli-data': ['usr/share/palapeli/collection/*.jpg'],
}
"""Patterns of the files by Debian package."""
PYTHON = {
    'skimage': [f'data/{name}' for name in ('astronaut.png', 'chelsea.png', 'coffee.png', 'rocket.jpg')]
    + ['data/motorcycle_left.png'],
    'sklearn': ['datasets/images/china.jpg', 'datasets/images/flower.jpg'],
}
"""Patterns of the files by Python package."""
LEAST_BYTES = 25_000
"""Smaller WebP files in the resources of GCompris are icons."""
SPLITS = 'source', 'fit', 'test'


def gather(folder: Path = FOLDER) -> list[Path]:
    """Returns the photographs, which it gathers if the folder does not exist.

    Args:
        folder: Gets a PNG file for each photograph, ``<package>_<name>.png``.

    Returns:
        The files, sorted by name.

    Raises:
        InputError: A package or a file in it is missing, or the folder can't be written.
    """
    if not folder.exists():
        with write_folder(folder) as new, tempfile.TemporaryDirectory() as scratch:
            for package, patterns in DEBIAN.items():
                _write(package, debian_package(package, Path(scratch)), patterns, new)
            for package, patterns in PYTHON.items():
                _write(package, python_package(package), patterns, new)
    return sorted(folder.glob('*.png'))


def _write(package: str, root: Path, patterns: Sequence[str], folder: Path) -> None:
    """Writes the photographs of one package, reduced to :data:`SHORTER_SIDE`.

    Raises:
        InputError: The package lacks a file.
    """
    from PIL import Image

    for pattern in patterns:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise InputError(f'the package {package} has no {pattern}; another version of it has other files')
        for path in paths:
            for name, image in _read(path):
                scale = min(1, SHORTER_SIDE / min(image.size))
                size = round(image.width * scale), round(image.height * scale)
                reduced = image.convert('RGB').resize(size, Image.Resampling.LANCZOS)
                reduced.save(folder / f'{package}_{name}.png')


def _read(path: Path) -> 'Iterator[tuple[str, Image]]':
    """Yields the name and the image of a file, or of each WebP file in resources of Qt."""
    from PIL import Image

    if path.suffix != '.rcc':
        with Image.open(path) as image:
            yield path.stem, image
        return
    for number, data in enumerate(find_webp(path.read_bytes())):
        with Image.open(BytesIO(data)) as image:
            yield f'{path.stem}_{number:02d}', image


def find_webp(data: bytes) -> Iterator[bytes]:
    """Yields the uncompressed WebP files of at least :data:`LEAST_BYTES` in some data, in their order."""
    start = 0
    while (start := data.find(b'RIFF', start)) >= 0:
        size = 8 + int.from_bytes(data[start + 4 : start + 8], 'little')
        if data[start + 8 : start + 12] == b'WEBP' and size >= LEAST_BYTES:
            yield data[start : start + size]
        start += 4


def split(photographs: Sequence[Path]) -> dict[str, list[Path]]:
    """Splits photographs into three disjoint parts, each with a third of every package.

    Args:
        photographs: The files, in any order.

    Returns:
        The files of ``'source'``, ``'fit'`` and ``'test'``.
    """
    ordered = sorted(photographs, key=lambda path: path.name)
    return {name: ordered[start :: len(SPLITS)] for start, name in enumerate(SPLITS)}


def crops(photographs: Sequence[Path], count: int, seed: int = 0, size: int = 224) -> 'NDArray[np.uint8]':
    """Cuts random resized crops: 25 to 100 % of the area, sides of ratio 3/4 to 4/3, bicubic.

    The crops of a photograph depend on its name, ``count``, ``seed`` and ``size``, not on the other photographs.

    Args:
        photographs: Image files.
        count: Crops of each photograph.
        seed: Seed of the random numbers, 0 or more.
        size: Side of a crop in pixels.

    Returns:
        The crops, uint8 of shape (photographs * count, size, size, 3), those of one photograph side by side. The
        channels are BGR, as :func:`mmdenoiserep.apis.corruptions.corrupt` expects them.
    """
    import numpy as np
    from PIL import Image

    images = np.empty((len(photographs), count, size, size, 3), np.uint8)
    for number, path in enumerate(photographs):
        generator = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
        with Image.open(path) as file:
            image = file.convert('RGB')
        for crop in range(count):
            area = generator.uniform(0.25, 1) * image.width * image.height
            ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = min(image.width, (area * ratio) ** 0.5), min(image.height, (area / ratio) ** 0.5)
            left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
            box = left, top, left + width, top + height
            images[number, crop] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))[..., ::-1]
    return images.reshape(-1, size, size, 3)


def main() -> None:
    """Gathers the photographs and prints how many each package and each split has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=FOLDER, help='folder for the photographs')
    photographs = gather(parser.parse_args().folder)
    for package, number in Counter(path.name.partition('_')[0] for path in photographs).items():
        print(f'{package}: {number}')
    for name, part in split(photographs).items():
        print(f'{name}: {len(part)} of {len(photographs)} photographs')


if __name__ == '__main__':
    launch(main)
