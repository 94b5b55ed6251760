"""One flipped bit in any file that naslora reads back: the file is refused, or nothing changes."""

import random

import pytest
import torch

from naslora.data.cache import Cache
from naslora.errors import UserError
from naslora.files import read_json, read_safetensors, read_torch
from naslora.results import read_history
from naslora.sam.runtimes import load_class_map
from reliability.conftest import own

pytestmark = pytest.mark.usefixtures("tiny_sam")


def predicted(path):
    class_map, description = load_class_map(path, trust=True)
    return class_map(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)), description


FILES = {
    "run/config.json": read_json,
    "run/metrics.json": read_json,
    "run/operations.json": read_json,
    "run/history.csv": lambda path: read_history(path.parent),
    "run/adapter/adapter_config.json": read_json,
    "run/adapter/adapter_model.safetensors": read_safetensors,
    "run/last.pt": read_torch,
    "merged/merged.json": read_json,
    "merged/model.safetensors": read_safetensors,
    "merged/left_out.safetensors": read_safetensors,
    "a.onnx": predicted,
    "a.pt2": predicted,
    "a.safetensors": predicted,
}


def same(one, other):
    """Whether two values are equal, with tensors inside."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def places(size, count, draw):
    """Bits of a file: half of them at its start and its end, where the descriptions are."""
    edge = min(4096, size)
    for number in range(count):
        low, high = ((0, size), (0, edge), (0, size), (size - edge, size))[number % 4]
        yield draw.randrange(low, high), draw.randrange(8)


def flipped(whole, byte, bit):
    return whole[:byte] + bytes([whole[byte] ^ (1 << bit)]) + whole[byte + 1 :]


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(world, name, many, capfd):
    path, read = own(world / name), FILES[name]
    whole, expected = path.read_bytes(), read(path)
    count = (300 if name.endswith((".json", ".csv")) else 40) if many else 4
    refused = 0
    for byte, bit in places(len(whole), count, random.Random(f"{int(many)} {name}")):
        path.write_bytes(flipped(whole, byte, bit))
        try:
            found = read(path)
        except UserError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error)
            assert path.name in str(error)
            refused += 1
        else:
            assert same(found, expected), f"bit {bit} of byte {byte} in {name} changed a value"
    assert not many or refused > count / 2 or name == "a.pt2"
    assert "Traceback" not in capfd.readouterr().err


def test_flipped_bits_in_the_cache(tmp_path):
    """A damaged entry is created again."""
    values = torch.arange(3000, dtype=torch.int16).to(torch.uint8).view(10, 10, 30), None
    cache = Cache(tmp_path)
    assert same(cache.get([b"a"], "how", lambda: values), values)
    (path,) = tmp_path.iterdir()
    whole, made = path.read_bytes(), []
    for byte, bit in places(len(whole), 40, random.Random(0)):
        path.write_bytes(flipped(whole, byte, bit))
        found = cache.get([b"a"], "how", lambda: made.append(1) or values)
        assert same(found, values) and path.read_bytes() == whole
    assert len(made) == 40
