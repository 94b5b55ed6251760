"""Merged models after training: other runtimes, many images, a server, and their comparison."""

import io
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from adapted_models import original_sam
from conftest import free_port, refusal, succeed, wait_for, write_data
from PIL import Image
from safetensors.torch import save_file

from naslora import UserError
from naslora.benchmark import Measured
from naslora.files import read_json
from naslora.prediction import predict_run
from naslora.records import read_rows
from naslora.sam.encoders import build_image_encoder
from naslora.sam.export import KEY, Scores, read_description
from naslora.sam.runtimes import load_class_map
from naslora.trained import export_run, load_model, merge_run

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("tiny_vit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_vit):
    """A folder with a binary run from a SAM checkpoint, and its merged models by mode."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    sam = original_sam(build_image_encoder("vit_t", 32), 32)
    save_file(sam.state_dict(), root / "sam.safetensors")
    data = write_data(root / "data", train=6, val=2, test=2)
    options = (
        f"--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0 "
        f"--learning-rate 3e-3 --checkpoint {root / 'sam.safetensors'}"
    )
    succeed("train", "--data", data, *options.split(), "--output", root / "run")
    for mode in ("exact", "center"):
        merge_run(root / "run", mode, root / mode)
    return root


def test_export_and_predict_from_the_command_line(folders, tmp_path):
    """A file must predict the masks of the merged model that it was made from."""
    pictures = sorted((folders / "data" / "images").glob("test*.png"))
    sources = []
    for mode, file_format in (("exact", "onnx"), ("center", "safetensors")):
        path = tmp_path / f"model.{file_format}"
        result = succeed("export", folders / mode, "--output", path, "--format", file_format)
        assert f"wrote {path}" in result.out
        sources += [folders / mode, path]
    masks = []
    for i, source in enumerate(sources):
        result = succeed("predict", source, *pictures, "--output", tmp_path / str(i), "--trust")
        assert "wrote 2 masks" in result.out
        assert len(list((tmp_path / str(i)).glob("*_overlay.jpg"))) == 2
        files = sorted((tmp_path / str(i)).glob("*_mask.png"))
        masks.append([np.asarray(Image.open(file)) for file in files])
    exact, center = (read_json(folders / mode / "merged.json") for mode in ("exact", "center"))
    for stored in (exact, center):  # what merging changed
        assert {"before", "after"} == stored["scores"].keys()
        assert all({"dice", "iou", "loss"} <= scores.keys() for scores in stored["scores"].values())
    losses = [exact["scores"][name]["loss"] for name in ("before", "after")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(masks[0]) == 2 and set(np.unique(masks[0])) <= {0, 255}
    for merged, file in (masks[:2], masks[2:]):
        # Labels may differ at pixels whose probability is 0.5 up to rounding.
        assert np.mean([np.mean(a == b) for a, b in zip(merged, file, strict=True)]) > 0.999


RUNTIMES = {  # the format and its options, and the largest difference of a score
    "a.xml": ("openvino", (), 1e-4, ("openvino",)),
    "a.onnx": ("onnx", (), 1e-4, ()),
    "b.xml": ("openvino", ("--quantize", "int8"), 0.2, ("openvino", "nncf")),
    "c.xml": ("openvino", ("--quantize", "float16"), 1e-2, ("openvino",)),
    "d.onnx": ("tensorrt", (), 1e-4, ()),
    "e.onnx": ("onnx", ("--quantize", "int8"), 0.2, ()),
    "f.onnx": ("onnx", ("--quantize", "float16"), 1e-2, ()),
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_other_runtimes_predict(folders, tmp_path, name):
    file_format, options, most, needs = RUNTIMES[name]
    for package in needs:
        pytest.importorskip(package)
    path = tmp_path / name
    command = ("export", folders / "center", "--format", file_format, "--max-loss", 1, *options)
    said = succeed(*command, "--output", path).out
    assert ("Dice on the validation images" in said) == bool(options)
    model, _ = load_model(folders / "center")
    class_map, held = load_class_map(path)
    assert held.image_size == 32
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = Scores(model)(x)
    # OpenVINO computes in bfloat16 where the processor has it.
    torch.testing.assert_close(class_map(x), expected, rtol=0, atol=max(most, 2e-2))
    assert {*map(str, tmp_path.iterdir())} == {str(path)} | {str(p) for p in tmp_path.glob("*.bin")}


def test_int8_that_loses_too_much_writes_nothing(folders, tmp_path, monkeypatch):
    dice = iter([0.8, 0.7])
    monkeypatch.setattr("naslora.trained.dice_of", lambda *_: next(dice))
    with pytest.raises(UserError, match=r"falls from 0\.8000 to 0\.7000.*nothing was written"):
        export_run(folders / "center", "onnx", tmp_path / "a.onnx", quantize="int8")
    assert not [*tmp_path.iterdir()]


def test_core_ml_takes_the_model(folders, tmp_path):
    """Core ML itself runs on macOS alone, so that only the package is looked at."""
    coremltools = pytest.importorskip("coremltools")
    path = tmp_path / "a.mlpackage"
    result = succeed("export", folders / "center", "--format", "coreml", "--output", path)
    assert result.err.count("\n") < 2  # no bars of progress
    held = coremltools.models.MLModel(str(path), skip_model_load=True)
    (image,), (scores,) = held.input_description, held.output_description
    kind = held.get_spec().description.input[0].type.multiArrayType
    assert (image, scores, [*kind.shape]) == ("images", "scores", [1, 3, 32, 32])
    assert read_description(held.user_defined_metadata[KEY]).image_size == 32
    again = refusal("export", folders / "center", "--format", "coreml", "--output", path)
    assert "is not empty" in again


def test_the_server_answers_several_at_once(folders, tmp_path):
    """The masks are those of predict. What is no image, or too large, is refused."""
    pytest.importorskip("litserve")
    pytest.importorskip("httpx")
    from bench.experiments.serving import ask, serving

    model, port = tmp_path / "a.onnx", free_port()
    export_run(folders / "center", "onnx", model)
    pictures = sorted((folders / "data" / "images").glob("*.png"))
    masks = predict_run(model, pictures, tmp_path / "masks", trust=True)
    contents = [picture.read_bytes() for picture in pictures]
    with serving(model, port, "--largest", "99999") as (server, client):
        answers, _ = ask(client, contents, 5)
        for mask, given in zip(masks, answers, strict=True):
            assert given.status_code == 200, given.text
            own = np.asarray(Image.open(io.BytesIO(given.content)))
            # Their sums are rounded in another order in batches, and they have no tiles.
            assert np.mean(own == np.asarray(Image.open(mask))) > 0.99
        refused, _ = ask(client, [b"x", b"x" * 100_000], 1)
        assert [answer.status_code for answer in refused] == [400, 413]
    with pytest.raises(ProcessLookupError):  # a SIGTERM ends the workers, too
        wait_for(lambda: os.killpg(server.pid, 0))


def test_images_go_through_several_processes_and_after_a_stop(folders, tmp_path, monkeypatch):
    """Shares of two processes, one of which stops, are completed, and equal one call's masks."""
    output, model = tmp_path / "out", folders / "center"
    inputs = [folders / "data" / "images"]
    whole = predict_run(model, inputs, tmp_path / "whole", batch_size=4)
    assert len(whole) == 10
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("naslora.predictor.make_accelerator", lambda _: Accelerator(cpu=True))
    written = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        written.append(predict_run(model, inputs, output, batch_size=2))
    assert [len(own) for own in written] == [5, 5]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "0")
    lines = (output / "manifest-1.csv").read_text().splitlines()
    (output / "manifest-1.csv").write_text("\n".join(lines[:3]) + "\n" + lines[3][:9])
    with pytest.raises(UserError, match="20 of the files to write exist"):
        predict_run(model, inputs, output)
    assert len(predict_run(model, inputs, output, resume=True)) == 3
    assert not predict_run(model, inputs, output, resume=True)
    for path in whole:
        assert (output / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"manifest.*\.csv is of another model"):
        predict_run(folders / "exact", inputs, output, resume=True)


def test_benchmark(folders, tmp_path, monkeypatch):
    # A new process has no tiny vit_t.
    monkeypatch.setattr("naslora.benchmark.in_own_process", lambda call, *given: call(*given))
    export_run(folders / "center", "onnx", tmp_path / "a.onnx")
    models = [folders / "center", tmp_path / "a.onnx"]
    result = succeed("benchmark", *models, "--images", 2, "--output", tmp_path / "out")
    assert "| a.onnx | onnx |" in result.out
    rows = read_rows(tmp_path / "out" / "benchmark.csv", Measured)
    assert [row.runtime for row in rows] == ["PyTorch, stock", "PyTorch, fused", "onnx"]
    assert all(0 < row.p50_ms <= row.p95_ms and row.peak_memory_mb > 50 for row in rows)
    assert rows[0].dice == pytest.approx(rows[2].dice, abs=1e-3)
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 1000
