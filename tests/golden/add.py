"""Adds a golden file: `add(name, data, inputs)`. One that is there is never written again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet import artifact
from whet.container import Opened

FOLDER = Path(__file__).parent


def said(tensor: Tensor) -> list[Any]:
    """Type, shape and checksum of the bytes of a tensor."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()[:16]]


def add(name: str, data: bytes, inputs: Tensor | None = None) -> None:
    """Write `data`, and what is to be read from it for ever, beside this file."""
    tensors = {key: said(tensor) for key, tensor in Opened(data).tensors()}
    found: dict[str, Any] = {"tensors": tensors}
    if inputs is not None:
        with torch.no_grad():
            outputs = artifact.decode(data)(inputs)
        found |= {"inputs": inputs.tolist(), "outputs": outputs.tolist()}
    with (FOLDER / f"{name}.whet").open("xb") as file:
        file.write(data)
    (FOLDER / f"{name}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
