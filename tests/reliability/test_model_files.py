"""Model files from others: they run no code, and what cannot be used costs one line."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import onnx.parser
import pytest
import torch
from adapted_models import as_torch
from conftest import call, refusal, succeed
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from naslora.errors import UserError
from naslora.files import read_json
from naslora.sam.export import Description, text_of
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import predict_labels
from naslora.trained import load_model
from reliability.conftest import fuzz, spoil

pytestmark = pytest.mark.usefixtures("tiny_sam")

# ---- Files that would run code -------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def entry(name: str):
    """Makes a weight or constant come from a record that is unpickled."""

    def change(content: bytes, mark: Path) -> bytes:
        stored = json.loads(content)
        stored["config"][next(iter(stored["config"]))] |= {"use_pickle": True, "path_name": name}
        return json.dumps(stored).encode()

    return change


def expression(content: bytes, mark: Path) -> bytes:
    code = f"__import__('pathlib').Path('{mark}').touch()"
    return re.sub(rb'"expr_str": "[^"]*"', f'"expr_str": "{code}"'.encode(), content, count=1)


WEIGHTS, CONSTANTS = (f"data/{kind}/model_{kind}_config.json" for kind in ("weights", "constants"))
EVIL_PROGRAMS = {
    "pickled sample inputs": {
        "data/sample_inputs/model.pt": lambda content, mark: as_torch(Evil(mark))
    },
    "a pickled weight": {
        WEIGHTS: entry("evil"),
        "data/weights/evil": lambda content, mark: as_torch(Evil(mark)),
    },
    "a pickled constant": {
        CONSTANTS: entry("opaque_obj_0"),
        "data/constants/opaque_obj_0": lambda content, mark: pickle.dumps(Evil(mark)),
    },
    "an expression": {"models/model.json": expression},
}


def changed_archive(path: Path, changes, *arguments) -> None:
    """Replaces or adds records of a .pt2 file."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name in records.keys() | {f"archive/{name}" for name in changes}:
            change = changes.get(name.removeprefix("archive/"))
            content = records.get(name, b"")
            archive.writestr(name, change(content, *arguments) if change else content)


@pytest.mark.parametrize("changes", EVIL_PROGRAMS.values(), ids=EVIL_PROGRAMS)
def test_programs_run_no_code_unless_they_are_trusted(world, changes):
    path, mark = world / "a.pt2", world / "ran"
    changed_archive(path, changes, mark)
    arguments = ("predict", path, world / "data/images", "--output", world / "out")
    line = refusal(*arguments)
    assert f"{path} may hold code" in line and "--trust" in line
    assert not mark.exists() and not (world / "out").exists()
    call(*arguments, "--trust")
    assert mark.exists(), "the file would have run nothing"


# ---- Models of other people ----------------------------------------------------------------------

GRAPH = """
<ir_version: 9, opset_import: ["": 17, "evil": 1]>
model (float[N, 3, H, W] images) => (float[N, 1, H, W] scores) <float[1] w = {0}> {
    moved = Add(images, w)
    scores = ReduceMax<axes=[1], keepdims=1>(moved)
}
"""
OURS = json.loads(text_of(Description("vit_t", 32, 1, ("foreground",))))
FOREIGN_GRAPHS = [
    ("w = {0}", "w = {1}", None),
    ("images", "x", "cannot segment an image: Required inputs (['x']) are missing"),
    ("H, W", "8, 8", "cannot segment an image: [ONNXRuntimeError] : 2 : INVALID_ARGUMENT"),
    (" scores)", " scores, float[N, 3, H, W] moved)", "cannot segment an image: too many values"),
    ("ReduceMax<axes=[1], keepdims=1>", "Relu", "cannot segment an image: it returns the shape"),
    ("Add", "Div", "cannot segment an image: its weights or its graph give NaN or infinities"),
    ("Add", "evil.Call", "is damaged or has another format"),
    ("float[N", "double[N", "is damaged or has another format"),
    ("{0}", '["location": "../secret"]', "its weights are in ../secret, and must be in model.on"),
    ("{0}", '["location": "/etc/passwd"]', "its weights are in /etc/passwd, and must be in"),
    ("{0}", '["location": "model.onnx.data"]', "model.onnx.data does not exist"),
]
FOREIGN_DESCRIPTIONS = [
    ("", "it was not written by naslora export"),
    ("[]", "its description is not a Description"),
    ("{", "is damaged or has another format"),
    ({"image_size": 10**9}, "Expected `int` <= 4096 - at `$.image_size`"),
    ({"image_size": -32}, "Expected `int` >= 1 - at `$.image_size`"),
    ({"image_size": 33}, "a positive multiple of 16 for SAM, got 33"),
    ({"num_classes": 0}, "Expected `int` >= 1 - at `$.num_classes`"),
    ({"num_classes": 2}, "returns the shape (1, 1, 32, 32), not (1, 2, 32, 32)"),
    ({"class_names": ["a", "b"]}, "class_names must name the 1 foreground classes"),
    ({"crop": -5}, "crop: expected int >= 16"),
    ({"intensity": ["x"]}, "intensity must be"),
    ({"part": "encoder"}, "holds only the image encoder"),
]


@pytest.mark.parametrize(
    "old, new, held, line",
    [
        *((old, new, OURS, line) for old, new, line in FOREIGN_GRAPHS),
        *(("", "", held, line) for held, line in FOREIGN_DESCRIPTIONS),
    ],
    ids=lambda value: str(value)[:40],
)
def test_foreign_onnx_models(world, old, new, held, line):
    path = world / "model.onnx"
    model = onnx.parser.parse_model(GRAPH.replace(old, new))
    text = held if isinstance(held, str) else json.dumps(OURS | held)
    model.metadata_props.add(key="naslora", value=text)
    onnx.save(model, path)
    before = sorted(world.rglob("*"))
    command = ("predict", path, world / "data/images/test0.png", "--output", world / "out")
    if line is None:
        succeed(*command)
        return
    found = refusal(*command)
    assert found.count("\n") == 1 and line in found and str(path) in found, found
    assert sorted(world.rglob("*")) == before


# ---- Random changes ------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
SHAPES = st.lists(st.integers(0, 4), max_size=5)
DTYPES = (torch.int8, torch.bool, torch.float16, torch.float64, torch.complex64)


def change_json(draw, value):
    spoil(draw, value, lambda part: draw(VALUES))
    return value


def change_merged(draw, path: Path) -> None:
    path.write_text(json.dumps(change_json(draw, read_json(path))))  # without its checksum


def change_tensor(draw, path: Path) -> None:
    tensors = load_file(path)
    name = draw(st.sampled_from([n for n in tensors if "qkv" in n or draw(st.integers(0, 9)) == 0]))
    change = draw(st.sampled_from(["drop", "dtype", "shape", "value", "name"]))
    tensor = tensors.pop(name)
    if change == "name":
        tensors[draw(st.text(min_size=1)).replace("\0", "0")] = tensor
    elif change != "drop":
        tensors[name] = {
            "dtype": lambda: tensor.to(draw(st.sampled_from(DTYPES))),
            "shape": lambda: torch.zeros(draw(SHAPES)),
            "value": lambda: tensor * draw(st.floats(width=32)),
        }[change]()
    save_file(tensors, path)


def change_onnx(draw, path: Path) -> None:
    """Changes a node, a weight's shape or type, or the description of a graph."""
    model = onnx.load(path)
    del model.metadata_props[-1]  # the checksum
    if draw(st.booleans()):
        node = model.graph.node[draw(st.integers(0, len(model.graph.node) - 1))]
        what = draw(st.sampled_from(["op_type", "input", "output", "attribute"]))
        if what == "op_type":
            node.op_type = draw(st.sampled_from(["Loop", "If", "Scan", "Reshape", "Conv", "x"]))
        else:
            del getattr(node, what)[:]
    elif draw(st.booleans()):
        weight = model.graph.initializer[draw(st.integers(0, len(model.graph.initializer) - 1))]
        weight.data_type = draw(st.integers(0, 24))
        weight.dims[:] = draw(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 64)))
    else:
        entry = model.metadata_props[-1]
        entry.value = json.dumps(change_json(draw, json.loads(entry.value)))
    onnx.save(model, path)


def change_program(draw, path: Path) -> None:
    names = ["models/model.json", WEIGHTS, CONSTANTS, "extra/naslora"]

    def change(content: bytes) -> bytes:
        return json.dumps(change_json(draw, json.loads(content))).encode()

    changed_archive(path, {draw(st.sampled_from(names)): change})


def segment_by_folder(path: Path) -> None:
    model, config = load_model(path.parent)
    predict_labels(model, torch.rand(1, 3, config.model.image_size, config.model.image_size))


def segment_by_file(path: Path) -> None:
    class_map, held = load_class_map(path, trust=True)
    class_map(torch.rand(1, 3, held.image_size, held.image_size))


CHANGES = {
    "merged/merged.json": (change_merged, segment_by_folder, 8),
    "merged/model.safetensors": (change_tensor, segment_by_folder, 8),
    "a.onnx": (change_onnx, segment_by_file, 5),
    "a.pt2": (change_program, segment_by_file, 2),
}


@pytest.mark.parametrize("factor", [1, pytest.param(60, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", CHANGES)
def test_random_changes(world, name, factor):
    """Changes a file at random places: it is read, or refused in one line that names it."""
    change, read, examples = CHANGES[name]
    path = world / name
    whole = path.read_bytes()

    def check(data) -> None:
        path.unlink()
        path.write_bytes(whole)
        change(data.draw, path)
        try:
            read(path)
        except UserError as error:
            assert str(path.parent) in str(error)
            raise

    fuzz(factor * examples, check, data=st.data())
