"""The bundled model made larger than it is: about a hundred million parameters that are multiplied and change nothing.

A small model's step is mostly overhead. What drafting gives a model of this size, whose texts are nevertheless worth
drafting for, can be measured with it on any machine; every figure of it says so by its name.
"""

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from stepladder.kernels.once import made_once

__all__ = ["INFLATED", "inflated"]

INFLATED = "demo-inflated"
BUNDLED = Path(__file__).parents[2] / "launch" / "demo_model"
LAYERS, INNER = 12, 10240
FIRST = "model.layers.0."
STD = 0.02  # of weights that have no effect


def inflated(cache: Path) -> Path:
    """Its directory: as many layers more and as wide FFNs that it has `LAYERS` of `INNER`. What is added ends in zeros,
    so that on one rank every output is bit for bit the bundled model's, with any kernels; more ranks have other shares
    of what counts, and add up in another order.

    Raises:
        ValueError: the cache cannot be written.
    """
    from stepladder.parallel.checkpoint import fingerprints  # brings torch's readers, which most paths need not

    mark = hashlib.sha256(f"{LAYERS} {INNER} {STD} {sorted(fingerprints(BUNDLED).items())}".encode()).hexdigest()
    return made_once(cache / f"{INFLATED}-{mark[:16]}", _write)


def _write(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(BUNDLED, folder, dirs_exist_ok=True)
    config = json.loads((BUNDLED / "config.json").read_text())
    old, dice = config["num_hidden_layers"], torch.Generator().manual_seed(0)
    weights = load_file(BUNDLED / "model.safetensors")
    names = [name.removeprefix(FIRST) for name in weights if name.startswith(FIRST)]
    for layer, name in product(range(LAYERS), names):
        like = weights[f"model.layers.{min(layer, old - 1)}.{name}"]
        weights[f"model.layers.{layer}.{name}"] = _widened(name, like, dice, added=layer >= old)
    config |= {"num_hidden_layers": LAYERS, "intermediate_size": INNER}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _widened(name: str, weight: Tensor, dice: torch.Generator, added: bool) -> Tensor:
    """A layer's weight with an FFN of `INNER`. added: the layer is new and adds nothing, else it is as it was."""
    if weight.dim() == 1:
        return weight.clone()
    rows, columns = weight.shape
    down = name.startswith("mlp.down")
    if name.startswith("mlp."):
        rows, columns = (rows, INNER) if down else (INNER, columns)
    wide = (torch.randn(rows, columns, generator=dice) * STD).to(weight.dtype)
    if down or (added and name.startswith("self_attn.o_proj")):
        wide.zero_()
    if not added:
        wide[: weight.shape[0], : weight.shape[1]] = weight
    return wide
