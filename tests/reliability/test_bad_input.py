"""The corpus of bad inputs, bad_inputs.yaml: each costs one line and an exit status."""

import json
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import call, succeed
from safetensors.torch import load_file, save_file

from naslora.files import file_checksum, read_json, write_json
from reliability.conftest import TRAIN, one_line, own

pytestmark = pytest.mark.usefixtures("tiny_sam")

CORPUS = yaml.safe_load((Path(__file__).parent / "bad_inputs.yaml").read_text())
LONG = "a" * 1500


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def spoil_json(path: Path, key: str, value: Any) -> None:
    """Sets a field, whose path has dots, and the checksum that matches."""
    stored = read_json(path)
    *parents, name = key.split(".")
    inner = stored
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    write_json(path, stored)


def spoil_tensors(path: Path, pattern: str, value: Any) -> None:
    """Changes the tensors whose names match; the file is then without checksum."""
    changed = {}
    for name, tensor in load_file(path).items():
        if not re.search(pattern, name):
            changed[name] = tensor
        elif value in ("nan", "inf") or isinstance(value, float):
            changed[name] = torch.full_like(tensor, float(value))
        elif value == "integer":
            changed[name] = tensor.to(torch.int8)
        elif value == "floating":
            changed[name] = tensor.float()
        elif value != "delete":
            changed[name] = torch.tensor(value)
    save_file(changed, path)


def spoil_torch(path: Path, key: str, value: Any) -> None:
    stored = torch.load(path, weights_only=True)
    if key == "everything":
        stored = value
    elif value == "delete":
        del stored[key]
    else:
        stored[key] = value
    torch.save(stored, path)


def spoil_file(world: Path, case: dict[str, Any]) -> None:
    kind = next(k for k in case if k not in ("run", "line", "content", "repeat"))
    path = world / case[kind]
    if kind != "remove":
        own(path)
    if kind == "text":
        path.write_text(case["content"] if "content" in case else case["repeat"] * 200_000)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "history":  # without the last epoch
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        spoil_json(own(path.with_name("metrics.json")), "history_sha256", file_checksum(path))
    elif kind == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == "stale":
        path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "0" * 64}))
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "pickle":
        torch.save({"image_encoder.pos_embed": Evil()}, path)
        path.with_suffix(".pkl").write_bytes(pickle.dumps(Evil()))
    elif kind == "flip":
        content = bytearray(path.read_bytes())
        content[2 * len(content) // 3] ^= 4
        path.write_bytes(content)
    else:
        raise ValueError(f"unknown kind {kind}")


def cases():
    for group in CORPUS:
        for case in group["cases"]:
            kind = next((k for k in ("json", "tensors", "torch") if k in group), None)
            name = case["line"] if isinstance(case, dict) else "-".join(map(str, case[:-1]))
            yield pytest.param(group, kind, case, id=f"{group['name']}-{name[:60]}")


def command(text: str, world: Path, clean: Path, **more: str) -> list[str]:
    words = shlex.split(text.replace("{input}", more.get("input", "")).replace("\\", "\\\\"))
    names = {"w": world, "long": LONG, "data": clean / "data", "sam": clean / "sam.safetensors"}
    line: list[str] = []
    for word in words:
        if word == "{train}":
            line += TRAIN
            continue
        for name, value in names.items():
            word = word.replace(f"{{{name}}}", str(value))
        line.append(word)
    return line


@pytest.mark.parametrize("group, kind, case", list(cases()))
def test_one_line_and_a_status(world, clean_world, capfd, group, kind, case):
    text, line = group.get("run"), case["line"] if isinstance(case, dict) else case[-1]
    if isinstance(case, dict):
        spoil_file(world, case)
        arguments = command(case["run"], world, clean_world)
    elif kind is None:
        # Options with parentheses as the shell would take them in quotes.
        words = (w if w[0] in "{-" else shlex.quote(w) for w in case[0].split())
        arguments = command(text, world, clean_world, input=" ".join(words))
    else:
        spoil = {"json": spoil_json, "tensors": spoil_tensors, "torch": spoil_torch}[kind]
        spoil(own(world / group[kind]), *case[:-1])
        arguments = command(text, world, clean_world)
    before = sorted(path for path in world.rglob("*"))
    result = call(*arguments)
    message = one_line(result.err)
    assert line in message, message
    assert result.status == 2 and message.startswith("naslora: error: ")
    assert len(message) < 2500 and "weights_only" not in message
    assert result.out == "" and "Traceback" not in capfd.readouterr().err
    assert sorted(path for path in world.rglob("*")) == before


@pytest.mark.parametrize("text", ["evaluate {w}/run", "merge {w}/run --output {w}/out"])
def test_nothing_is_written_where_a_file_says(world, clean_world, text):
    spoil_json(own(world / "run/config.json"), "data.cache", str(world / "elsewhere"))
    succeed(*command(text, world, clean_world))
    assert not (world / "elsewhere").exists()


def test_no_arguments_print_the_usage():
    result = call()
    assert result.status == 2 and result.out == "" and "Traceback" not in result.err
    assert "usage: naslora" in result.err and "train" in result.err


def test_damage_behind_a_checksum_that_matches(world):
    """A run without checksums and versions loads: whoever edits a file removes its checksum."""
    for path in (world / "run/config.json", world / "run/adapter/adapter_config.json"):
        stored = read_json(path)
        stored.pop("other_tensors", None)
        own(path).write_text(json.dumps(stored))
    path = world / "run/adapter/adapter_model.safetensors"
    save_file(load_file(path), own(path))
    succeed("evaluate", world / "run")
