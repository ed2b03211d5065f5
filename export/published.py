"""Read the weights of published checkpoints without running or importing anything that the file names.

Stage 1 was published as a dictionary: `model`, a state dict; `ema`, the state of torch_ema; `optimizer`; `epoch`. Stage
2 was published as a whole pickled network. A pickle is a program: it names functions and the arguments to call them
with. Here, no name is looked up. A name on a short list becomes a note of the name and its arguments (`Note`). Any
other name ends the reading. The notes are then searched for tensors. Only the requested tensors are read from the file,
so the optimiser's state costs no memory.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from bsdiff_rt.errors import BundleError, SettingsError, one_line

WeightsName = Literal["model", "ema", "raw"]

# The names that the checkpoints of these networks contain; that they stay names is what makes `monai.` harmless.
_KNOWN = re.compile(
    r"(generative|monai|einops|torch\.nn)\.[\w.]+"
    r"|collections\.(OrderedDict|Counter|defaultdict)|(builtins|__builtin__)\.set"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w+Storage"
    r"|torch\.(device|Size|bool|b?float\d+|u?int\d+)"
    r"|numpy(\._?core\.multiarray\.scalar|\.dtype)|_codecs\.encode"  # a loss kept as a NumPy number
)
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
}


class Note(dict[Any, Any]):
    """What a file says about one object: name of its class or function, arguments, state, items.

    Unpickling creates notes, gives them a state and sets items. None of this calls anything.
    """

    name: str = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Note:
        note = super().__new__(cls)
        note.args = args
        note.state = None
        return note

    def __init__(self, *args: Any, **_: Any) -> None:
        """Ignore the arguments: unlike a dict's, they are no items."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _NoteTaker(pickle.Unpickler):
    """Unpickle into notes, lists, tuples, dictionaries and plain values."""

    def find_class(self, module: str, name: str) -> type[Note]:
        full_name = f"{module}.{name}"
        if not _KNOWN.fullmatch(full_name):
            raise BundleError(
                f"it names {full_name!r}, which no checkpoint of the published networks contains. Nothing in it was "
                "run. Loading it with torch.load might run it: find out where the file comes from."
            )
        return type("Note", (Note,), {"name": full_name})  # one per use: a file can change no other's

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_published_weights(path: Path, weights: WeightsName = "model") -> dict[str, torch.Tensor]:
    """Return the weights in a published checkpoint by their published keys, float32, on the CPU.

    The file may hold a whole pickled network, a state dict, or a dictionary with either under `model`. If all keys
    begin with `module.` (torch.nn.DataParallel), the prefix is removed.

    Args:
        path: a file written by torch.save, in the zip format that is torch's default since 1.6.
        weights: which weights of a dictionary. `model`: the entry that the published Test.py loads. `ema`: the averaged
            weights. `raw`: the optimiser's, those set aside while the averages were in place, else `model`.

    Raises:
        SettingsError: there is no such file.
        BundleError: it is no such checkpoint, is damaged, or names something that no such checkpoint contains.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
            folder = pickled.removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise BundleError("it was written on a big-endian machine. Load and save it on a little-endian one.")
            content = _NoteTaker(io.BytesIO(archive.read(pickled))).load()
            entries = _choose(content, weights)
            if all(key.startswith("module.") for key in entries):
                entries = {key.removeprefix("module."): value for key, value in entries.items()}
            return {key: _tensor(archive, folder, key, value) for key, value in entries.items()}
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    except Exception as error:  # a damaged or hostile pickle raises anything
        raise BundleError(
            f"{path}: not a checkpoint that can be read ({one_line(error)}). It must be written by torch.save of "
            "torch 1.6 or newer. Load and save an older file again if you trust it."
        ) from error


def _choose(content: Any, weights: WeightsName) -> dict[str, Any]:
    """Return the notes of the chosen weights by published key."""
    wrapped = isinstance(content, dict) and "model" in content
    model = content["model"] if wrapped else content
    if not isinstance(model, dict):
        raise BundleError("it holds neither a network nor a dictionary of weights")
    entries = dict(_parameters(model, "")) if _is_network(model) else dict(model)
    if not entries:
        raise BundleError("it holds no weights")
    ema = content.get("ema", {}) if wrapped else {}
    if weights == "model" or (weights == "raw" and not ema.get("collected_params")):
        return entries
    values = ema.get("shadow_params" if weights == "ema" else "collected_params")
    if not isinstance(values, list):
        raise BundleError("it holds no averaged weights (ema: shadow_params). Choose --weights model.")
    if len(values) != len(entries):
        raise BundleError(f"ema holds {len(values)} tensors, model {len(entries)}. Choose --weights model.")
    return dict(zip(entries, values, strict=True))  # torch_ema keeps a list, in the order of model.parameters()


def _is_network(content: Any) -> TypeGuard[Note]:
    """Return whether a note describes a torch.nn.Module."""
    return isinstance(content, Note) and isinstance(content.state, dict) and "_modules" in content.state


def _parameters(module: Note, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield keys and notes as `state_dict` lists them: own parameters and buffers, then those of the modules inside."""
    for kind in ("_parameters", "_buffers"):
        for key, value in module.state[kind].items():
            if value is not None:
                yield prefix + key, value
    for key, child in module.state["_modules"].items():
        if _is_network(child):  # else None, or one that keeps no parameters and a state of its own (einops)
            yield from _parameters(child, f"{prefix}{key}.")


def _tensor(archive: zipfile.ZipFile, folder: str, key: str, value: Any) -> torch.Tensor:
    """Read the tensor that a note describes from the archive."""
    if isinstance(value, Note) and value.name == "torch._utils._rebuild_parameter":
        value = value.args[0]
    if not isinstance(value, Note) or value.name != "torch._utils._rebuild_tensor_v2":
        raise BundleError(f"{key} is no tensor. The file must hold only weights there.")
    (_, storage, name, _, _), offset, size, stride = value.args[:4]
    if storage.name not in _DTYPES:
        raise BundleError(f"{key} is stored as {storage.name}. Weights must be floating-point numbers.")
    data = bytearray(archive.read(f"{folder}data/{name}"))
    return torch.frombuffer(data, dtype=_DTYPES[storage.name]).as_strided(size, stride, offset).float()
