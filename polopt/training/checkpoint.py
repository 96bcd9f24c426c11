"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `run/checkpoints/step-00000012/` with three files:

    state.safetensors   every tensor
    state.json          everything else, with a reference where a tensor stood
    manifest.json       size in bytes and sha256 of the two files above

It is written beside its final name, synced to disk and renamed, so under its final name it is always complete. One
process writes to a run folder at a time.

A state is a nest of dicts (keys str or int), lists and tuples over tensors, int, float, str, bool and None. It comes
back equal: same types, same order of keys, same bits of floats and tensors (a NaN comes back as the default NaN).
Tensors come back on the CPU without gradient; two references to one tensor come back as two references to one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polopt.core.errors import UsageError

FORMAT_VERSION: Final = 1

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
# `.replaced` is a complete checkpoint moved aside while another of the same step takes its name.
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY = ".tmp-"


def save_checkpoint(run: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step` and return its folder.

    A checkpoint of the same step is replaced. Once the new one is on disk, checkpoints of earlier steps are removed
    until `keep` remain, this one included; those of later steps are never touched.

    Raises:
        UsageError: a negative step or keep < 1.
        TypeError: a value that a checkpoint cannot hold, with its path in the state.
        OSError: the disk refused (full, read-only); the previous checkpoint is intact.
    """
    if step < 0:
        raise UsageError(f"a checkpoint needs a step of at least 0, got {step}")
    if keep < 1:
        raise UsageError(f"keep is the number of checkpoints that remain, at least 1, got {keep}")
    folder = run / "checkpoints"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync(run)
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)

    tensors: dict[str, Tensor] = {}
    document = {"format_version": FORMAT_VERSION, "step": step, "state": _encode(state, "state", tensors, {})}
    temporary = folder / f"{_TEMPORARY}step-{step:08d}"
    temporary.mkdir()
    try:
        save_file(_without_shared_storage(tensors), temporary / _TENSORS)
        _write_json(temporary / _STATE, document)
        files = {name: _fingerprint(temporary / name) for name in (_TENSORS, _STATE)}
        _write_json(temporary / _MANIFEST, {"format_version": FORMAT_VERSION, "step": step, "files": files})
        for name in (_TENSORS, _STATE, _MANIFEST):
            _sync(temporary / name)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    target, aside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.replaced"
    if target.exists():
        _remove(aside)
        target.rename(aside)
    temporary.rename(target)
    _sync(folder)
    _remove(aside)
    older = sorted((s, path) for s, path in _checkpoints(folder) if s < step)
    for _, path in older[: max(0, len(older) - (keep - 1))]:
        _remove(path)
    return target


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest step in `run`, or None. Unfinished ones are ignored."""
    found = _checkpoints(run / "checkpoints")
    # Of one step under both names, the plain name is the newer: it sorts first as the shorter.
    return max(found, key=lambda item: (item[0], -len(item[1].name)))[1] if found else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read back the state that `save_checkpoint` wrote at `path`, after checking size and sha256 of every file.

    Raises:
        UsageError: a file is missing, truncated or altered, or was written by a newer format; names the file.
    """
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}; give a folder such as RUN/checkpoints/step-00000100")
    manifest = _read_json(path / _MANIFEST)
    files, step = manifest.get("files"), manifest.get("step")
    for name in (_TENSORS, _STATE):
        expected = files.get(name) if isinstance(files, dict) else None
        if not isinstance(expected, dict):
            raise _damaged(path / _MANIFEST, f"does not list {name}")
        _verify(path / name, expected)
    document = _read_json(path / _STATE)
    if document.get("step") != step:
        raise _damaged(path / _MANIFEST, f"says step {step}, but {_STATE} says step {document.get('step')}")
    try:
        tensors = load_file(path / _TENSORS, device="cpu")
    except SafetensorError as error:
        raise _damaged(path / _TENSORS, f"is not readable ({error})") from error
    try:
        return cast(dict[str, Any], _decode(document["state"], tensors))
    except KeyError as error:
        raise _damaged(path / _STATE, f"refers to {error}, which is nowhere in the checkpoint") from error


def random_state() -> dict[str, Any]:
    """State of Python's `random`, NumPy's global generator, torch's CPU generator and every CUDA generator."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "algorithm": algorithm,
            "keys": [int(key) for key in keys],
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo whatever was drawn since `random_state()`.

    CUDA generators are restored device by device; devices that exist only in the checkpoint, or only here, are left
    alone, so a run can move between machines (its CUDA draws then differ).
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state(
        (
            numpy["algorithm"],
            np.array(numpy["keys"], dtype=np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached_gauss"],
        )
    )
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, generator in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(generator, device)


# --- the JSON half ----------------------------------------------------------------------------------------------------
# JSON values stand for themselves; an object with one key that starts with "$" stands for what JSON lacks.


def _encode(value: Any, path: str, tensors: dict[str, Tensor], seen: dict[tuple[object, ...], str]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": _register(value, path, tensors, seen)}
    if isinstance(value, list):
        return [_encode(item, f"{path}/{i}", tensors, seen) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, f"{path}/{i}", tensors, seen) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"{path} has the key {key!r}; keys of a checkpoint are str or int")
        items = [(key, _encode(item, f"{path}/{key}", tensors, seen)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
        return dict(items) if plain else {"$items": [[key, item] for key, item in items]}
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; convert it first")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "$float":
            return float(content)
        if tag == "$tensor":
            return tensors[content]
        if tag == "$tuple":
            return tuple(_decode(item, tensors) for item in content)
        if tag == "$items":
            return {key: _decode(item, tensors) for key, item in content}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _register(tensor: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[tuple[object, ...], str]) -> str:
    """Name of `tensor` among the saved ones; a second reference to the same memory and shape gets the first's name."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype.is_complex:
        raise TypeError(
            f"{path} is a {tensor.dtype} tensor with layout {tensor.layout} on {tensor.device}; "
            "a checkpoint holds dense real tensors with data"
        )
    identity = (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_neg(),
    )
    if tensor.numel() and identity in seen:
        return seen[identity]
    # The index makes names unique whatever the keys are; the path is for people who open the file.
    name = f"{len(tensors)}:{path}".encode("utf-8", "backslashreplace").decode()
    tensors[name] = tensor
    seen[identity] = name
    return name


def _without_shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies for safetensors, which refuses tensors that share memory; copies only where it must."""
    used: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().resolve_neg().cpu().contiguous()
        storage = dense.untyped_storage()
        if storage.nbytes() != dense.nbytes or storage.data_ptr() in used:
            dense = dense.clone()
        if dense.numel():
            used.add(dense.untyped_storage().data_ptr())
        result[name] = dense
    return result


# --- files ------------------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for match, path in matches if match]


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way never leaves part of one under a checkpoint's name."""
    if not path.exists():
        return
    trash = path.with_name(f"{_TEMPORARY}trash-{path.name}")
    path.rename(trash)
    shutil.rmtree(trash)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="ascii")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _damaged(path, "is missing")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, f"is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise _damaged(path, "does not hold a JSON object")
    version = document.get("format_version")
    if not isinstance(version, int):
        raise _damaged(path, "has no format_version")
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{path} has format_version {version}, but this polopt reads up to {FORMAT_VERSION}; upgrade polopt"
        )
    return document


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path, "is missing")
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise _damaged(path, f"has {size} bytes where the manifest says {expected.get('bytes')}")
    if _fingerprint(path)["sha256"] != expected.get("sha256"):
        raise _damaged(path, "differs from the sha256 in the manifest")


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"checkpoint file {path} {what}; delete the folder {path.parent} to resume from an earlier one")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
