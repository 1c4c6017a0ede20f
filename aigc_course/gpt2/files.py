"""Hugging Face folders of GPT-2: found, read strictly, written; only safetensors, never a pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..checkpoints import check_header, write_atomically
from ..runtime import CourseError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OURS_TO_THEIRS = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "layer_norm_eps": "layer_norm_epsilon",
}
# What this model always does; a checkpoint that asks for anything else is refused.
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Their linear layers keep the transpose of torch.nn.Linear's weight.
LINEAR = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class GPT2Error(CourseError):
    """Token ids that the model cannot take, or a checkpoint that is not a GPT-2."""


def _error(path: Path, expected: str, found: object, remedy: str) -> GPT2Error:
    found = (str(found).splitlines() or ["nothing"])[0]
    return GPT2Error(f"{path}: expected {expected}, found {found}; {remedy}")


REFETCH = "fetch or copy the whole checkpoint again"


def find(path_or_name: str | Path) -> Path:
    """The folder that ``path_or_name`` names here, or the local copy of that repository on the hub, fetched if need be.

    A bare published size such as "gpt2-medium" stands for OpenAI's repository of it.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise _error(path, "the folder of a checkpoint", "none", "check the path, or name a repository on the hub")
    repository = name if "/" in name else f"openai-community/{name}"
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS, INDEX, "model-*.safetensors"]))
    except Exception as error:
        raise GPT2Error(
            f"{name!r} is no folder here, and {repository} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): go online once and it is kept, or give the path of a local copy; the models "
            "that come with the course, recipes.load_pretrained('tang') or ('shakespeare'), need no network"
        ) from error


def read_config(folder: Path) -> dict[str, int | float]:
    """The settings in ``config.json``, by the names of ``GPT2Config``."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise _error(path, "the settings of a GPT-2 in JSON", error, REFETCH) from error
    for name, allowed in FIXED.items():
        value = config.get(name, allowed[0] if name != "model_type" else None)
        if value not in allowed:
            raise _error(path, f"{name} {allowed[0]!r}", repr(value), "open this model with transformers instead")
    settings = {}
    for ours, theirs in OURS_TO_THEIRS.items():
        kind = float if ours == "layer_norm_eps" else int
        value = config.get(theirs, 1e-5 if kind is float else None)
        if type(value) is not kind or not 0 < value < 10**7:
            raise _error(path, f"{theirs}, a positive {kind.__name__}", repr(value), REFETCH)
        settings[ours] = value
    if config.get("n_inner") not in (None, 4 * settings["n_embd"]):
        raise _error(path, "n_inner 4 n_embd", config["n_inner"], "open this model with transformers instead")
    rates = [config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if not all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in rates) or len(set(rates)) > 1:
        raise _error(path, "one dropout rate in [0, 1)", rates, "make the three rates equal")
    return {**settings, "dropout": float(rates[0])}


def read_weights(folder: Path, like: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors`` by our names, in float32: just those of ``like``, in these shapes."""
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with open(path, "rb") as file:
                check_header(file)
            loaded = safetensors.torch.load_file(path)
        except Exception as error:
            raise _error(path, "a safetensors file", f"{type(error).__name__}: {error}", REFETCH) from error
        for name, tensor in loaded.items():
            if (bare := name.removeprefix("transformer.")) in weights:
                raise _error(path, "each tensor once", f"{bare!r} twice", REFETCH)
            weights[bare] = tensor
    path = folder / WEIGHTS
    head = weights.pop("lm_head.weight", None)
    ours = {}
    for name, shape in like.items():
        if (theirs := _their_name(name)) not in weights:
            raise _error(path, f"the tensor {theirs!r}", f"{len(weights)} others", REFETCH)
        tensor = weights.pop(theirs)
        expected = tuple(reversed(shape)) if _is_linear(name) else tuple(shape)
        if tuple(tensor.shape) != expected:
            raise _error(path, f"shape {expected} for {theirs!r}", tuple(tensor.shape), f"does {CONFIG} belong to it?")
        if tensor.dtype not in FLOATS:
            raise _error(path, f"float32, float16 or bfloat16 for {theirs!r}", tensor.dtype, "convert it first")
        if not tensor.isfinite().all():
            raise _error(path, f"finite numbers in {theirs!r}", "NaN or infinity", REFETCH)
        tensor = tensor.float()
        ours[name] = tensor.T.contiguous() if _is_linear(name) else tensor
    # older files keep each layer's causal mask among the weights
    extra = sorted(name for name in weights if not name.endswith((".attn.bias", ".attn.masked_bias")))
    if extra:
        raise _error(path, f"{len(like)} tensors", f"{len(extra)} more, such as {extra[0]!r}", "is it a plain GPT-2?")
    if head is not None and (
        head.shape != ours["wte.weight"].shape or not torch.equal(head.float(), ours["wte.weight"])
    ):
        raise _error(path, "an output layer tied to wte", "another one", "open this model with transformers instead")
    return ours


def write(folder: Path, config: Mapping, dropout: float, weights: Mapping[str, Tensor]) -> Path:
    """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does; each file whole or not at all."""
    theirs = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().float()
        if not tensor.isfinite().all():
            raise _error(folder, f"finite numbers in {name!r}", "NaN or infinity", "nothing was written: train again")
        theirs[f"transformer.{_their_name(name)}"] = (tensor.T if _is_linear(name) else tensor).contiguous()
    facts = {"architectures": ["GPT2LMHeadModel"], **{name: allowed[0] for name, allowed in FIXED.items()}, **config}
    facts |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "dtype": "float32"}
    facts |= {"bos_token_id": config["vocab_size"] - 1, "eos_token_id": config["vocab_size"] - 1}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(theirs, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    return folder


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a file's name is no string")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _error(index, "the list of the weights' files", error, REFETCH) from error
        if any(os.path.basename(name) != name or not (folder / name).is_file() for name in names):
            raise _error(index, "files in this folder", ", ".join(names), REFETCH)
        return [folder / name for name in names]
    pickles = [name for name in ("pytorch_model.bin", "tf_model.h5") if (folder / name).exists()]
    found = f"only {pickles[0]}, which was not opened (it could run code)" if pickles else "no such file"
    raise _error(folder / WEIGHTS, "the weights as safetensors", found, "fetch the safetensors, or convert it yourself")


def _their_name(name: str) -> str:
    name = name.replace("blocks.", "h.", 1)
    for ours, theirs in LINEAR.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _is_linear(name: str) -> bool:
    return name.endswith(tuple(f".{layer}.weight" for layer in LINEAR))
