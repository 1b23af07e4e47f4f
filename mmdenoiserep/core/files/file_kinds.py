"""Recognises files that are no PyTorch checkpoints, and reads safetensors files."""

import json
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from ..utils.errors import CheckpointError

SIGNATURES = (
    (b'version https://git-lfs', 'is a pointer of git-lfs, not the file itself; run git lfs pull in its repository'),
    (b'\x89HDF\r\n\x1a\n', 'is an HDF5 file, as Keras writes it; convert it to a PyTorch state dict'),
    (b'GGUF', 'is a GGUF file; take the PyTorch or the safetensors file of the same model'),
    (b'\x93NUMPY', 'is an array of numpy; save a dict of tensors with torch.save instead'),
    (b'\x1f\x8b', 'is a gzip archive; unpack it, and take the file in it'),
    (b'BZh', 'is a bzip2 archive; unpack it, and take the file in it'),
    (b'\xfd7zXZ\0', 'is an xz archive; unpack it, and take the file in it'),
    (b'7z\xbc\xaf', 'is a 7z archive; unpack it, and take the file in it'),
    (b'Rar!', 'is a RAR archive; unpack it, and take the file in it'),
    (b'(\xb5/\xfd', 'is a zstd archive; unpack it, and take the file in it'),
    (b'\x89PNG', 'is a picture; take the file with the weights'),
    (b'\xff\xd8\xff', 'is a picture; take the file with the weights'),
)
"""First bytes of a file, and the end of the error message."""

HTML_TAGS = (b'<!doctype', b'<html', b'<head')
ONNX_TAGS = (b'\x12', b'"', b'*', b'2', b':')
"""Protobuf tags that may follow the version in an ONNX file: producer, domain, model version, doc string, graph."""


def describe_kind(path: Path) -> str | None:
    """Returns the end of an error message that says what a file is and what to do; None if the kind is unknown."""
    with path.open('rb') as file:
        head = file.read(512)
        file.seek(max(0, path.stat().st_size - 1))
        last = file.read(1)
    if not head:
        return 'is empty; copy or download it again'
    for beginning, sentence in SIGNATURES:
        if head.startswith(beginning):
            return sentence
    if head.lstrip().lower().startswith(HTML_TAGS):
        return 'is a web page, not the file; the address needs a login, or is that of a page about the file'
    if head[257:262] == b'ustar':
        return 'is a tar archive; unpack it, and take the file in it'
    if head.startswith(b'{') and last in b'}\n':
        return _describe_json(path)
    if path.suffix == '.onnx' or (head[:1] == b'\x08' and 0 < head[1] < 32 and head[2:3] in ONNX_TAGS):
        return 'is an ONNX model; take the PyTorch checkpoint that it was exported from'
    if zipfile.is_zipfile(path):
        return _describe_archive(path)
    if head[:1] == b'\x80' and last == b'.':
        return (
            'is a plain pickle that torch.save did not write, as Detectron2, PaddlePaddle and joblib do; '
            'load it with their library, and save a dict of tensors with torch.save'
        )
    return _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    if re.search(rb'[\x00-\x08\x0e-\x1f\x7f]', head):
        return None
    try:
        text = head[: head.rfind(b'\n')].decode() if b'\n' in head else head.decode()
    except UnicodeDecodeError:
        return None
    first = next((line.strip() for line in text.splitlines() if line.strip()), '')
    return f'is a text file, which begins with {first[:60]!r}; take the file with the weights'


def _describe_json(path: Path) -> str | None:
    if path.stat().st_size > 2**26:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    parts = content.get('weight_map') if isinstance(content, dict) else None
    if isinstance(parts, dict):
        files = sorted({str(part) for part in parts.values()})
        return (
            f'is the index of a checkpoint in {len(files)} parts ({", ".join(files[:2])}, ...); '
            'read all of them, and save one dict of their tensors'
        )
    return 'is a JSON file; take the file with the weights'


def _describe_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    inside = [name for name in names if name.endswith(('.pth', '.pt', '.ckpt', '.bin', '.safetensors'))]
    if any(name.endswith('/constants.pkl') for name in names):
        return (
            'is a TorchScript archive, a program with its weights; save the state dict of the model instead: '
            'torch.save(torch.jit.load(FILE).state_dict(), OUT)'
        )
    if any(name.endswith('/data.pkl') for name in names):
        return None
    if inside:
        return f'is a zip archive; unpack it, and take {inside[0]}'
    if names and all(name.endswith('.npy') for name in names):
        return 'is an archive of numpy arrays; save a dict of tensors with torch.save instead'
    return 'is a zip archive without a checkpoint in it'


def pickle_protocol(path: Path) -> int | None:
    """Returns the pickle protocol of a zip file of ``torch.save``; None for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith('/data.pkl'))
            with archive.open(name) as file:
                opcode, argument, _ = next(pickletools.genops(file.read(2)))
    except (StopIteration, zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return None
    return argument if opcode.name == 'PROTO' else None


DTYPES = {
    'BOOL': torch.bool,
    'U8': torch.uint8,
    'I8': torch.int8,
    'I16': torch.int16,
    'I32': torch.int32,
    'I64': torch.int64,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F32': torch.float32,
    'F64': torch.float64,
}
"""Dtypes by their names in safetensors files."""

MAX_HEADER_BYTES = 10**8


def is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a header that fits into the file, and with JSON."""
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        return 2 <= length <= min(size - 8, MAX_HEADER_BYTES) and file.read(1) == b'{'


def read_safetensors(path: Path) -> 'OrderedDict[str, Tensor]':
    """Reads a safetensors file: the length of the header (8 bytes), the header (JSON), the bytes of the tensors.

    Raises:
        CheckpointError: The file is damaged or has an unsupported dtype.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != '__metadata__'}
            for name, entry in entries.items():
                if entry['dtype'] not in DTYPES:
                    raise CheckpointError(f'{path}: {name} has the dtype {entry["dtype"]}, which is not supported')
                start, end = entry['data_offsets']
                if not 0 <= start <= end <= size - 8 - length:
                    raise ValueError(f'{name} lies beyond its end')
                file.seek(8 + length + start)
                data = bytearray(file.read(end - start))
                dtype = DTYPES[entry['dtype']]
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device='cpu')
                state[name] = flat.view(entry['shape'])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise CheckpointError(
                f'{path} is a damaged safetensors file ({error}); copy or download it again'
            ) from None
    return state
