"""Folders of LoRA and DoRA adapters in the form of peft, read without peft: which tensors they change, by what.

`adapter_config.json` says how, `adapter_model.safetensors` holds the factors: for a weight W `[out, in]` of the base
the pair A `[r, in]` and B `[out, r]`, and W becomes W + s · B A. Hu et al. 2021, arXiv:2106.09685; s is alpha / r, or
alpha / √r where the adapter is rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.checkpoint import INDEX, LORA, SINGLE, Headers, TensorHeader, TensorReader, read_file_headers
from graft.disk import atomic_write
from graft.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
START = "base_model.model."
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to initialise factors that leave the base's weights as they are."""

MAGNITUDE = "lora_magnitude_vector"
"""The lengths of a weight's rows, trained by DoRA."""

VARIANTS = (
    "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "layer_replication",
    "trainable_token_indices",
)  # fmt: skip
"""Settings under which an adapter is something else than a sum with its base."""


@dataclass(frozen=True)
class Factors:
    """A change of one weight: `scale · B A`, or its transpose. `a` and `b` are names in the adapter's file."""

    a: str
    b: str
    rank: int
    scale: float
    transposed: bool
    """The base stores the weight as `[in, out]`."""


@dataclass(frozen=True)
class Shift:
    """`scale` times the adapter's vector `own`, added to one of the base."""

    own: str
    scale: float


@dataclass(frozen=True)
class Rescale:
    """Rows (`axis` 0) or columns (1) of the tensor as it is stored, times `rest + scale · own`."""

    own: str
    scale: float
    axis: int
    rest: float = 1.0


@dataclass(frozen=True)
class Fade:
    """The whole tensor times `by`."""

    by: float


@dataclass(frozen=True)
class Mixing:
    """The tensor as it is stored times `keep + scale · B A` (transposed, where the factors are), from the left (`axis`
    0) or from the right (1)."""

    factors: Factors
    axis: int
    keep: float = 1.0


@dataclass(frozen=True)
class Turning:
    """`weight` times what DoRA makes of a frozen weight W: W + ΔW, its rows as long as `magnitude` says.

    Liu et al. 2024, arXiv:2402.09353, equation 5. `parts` add up to ΔW; `axis` is that of W's rows as it is stored.
    """

    parts: tuple[Factors, ...]
    magnitude: str
    weight: float
    axis: int


@dataclass(frozen=True)
class Stretch:
    """What another adapter has added to a bias so far, stretched as `turning` stretches the rows of `matrix`."""

    matrix: str
    turning: Turning


Change = Factors | Shift | Rescale | Fade | Mixing | Turning | Stretch


@dataclass(frozen=True)
class Lora:
    """What an adapter's folder holds. Names of tensors are those that the base's model gives them."""

    folder: Path
    config: Mapping[str, Any]
    changes: Mapping[str, tuple[Change, ...]]
    """What becomes of a tensor, in this order."""
    whole: Mapping[str, str]
    """Tensors that take the place of the base's, before any change: name in the base → name in the adapter's file."""
    headers: Headers


class LoraReader(TensorReader):
    """Reads the tensors of an adapter's file."""

    def __init__(self, lora: Lora):
        self.folder, self.headers = lora.folder.resolve(), lora.headers
        self._files = {file: os.open(file, os.O_RDONLY) for file in {header.file for header in lora.headers.values()}}


def is_lora(folder: Path | str) -> bool:
    """Whether a folder holds an adapter in the form of peft, and no model."""
    place = Path(folder)
    return (place / CONFIG).is_file() and not any((place / name).is_file() for name in (SINGLE, INDEX))


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises CheckpointError for a damaged one and RequestError for what is no plain LoRA."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: the configuration is damaged ({error})") from None
    if config.get("peft_type") != "LORA":
        raise RequestError(
            f"{folder}: expected a LoRA adapter, found {config.get('peft_type')}: fold it into its base first"
        )
    if variants := [key for key in VARIANTS if config.get(key)]:
        raise RequestError(
            f"{folder}: expected a plain LoRA adapter, found {', '.join(variants)}: fold it into its base first"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise RequestError(
            f"{folder}: its start ({config['init_lora_weights']}) changed the weights of the base: save it as "
            "a plain LoRA adapter (peft: path_initial_model_for_weight_conversion)"
        )
    return config


def base_folder(folder: Path) -> Path | None:
    """Where the base that the adapter names lies on this machine, seen from the adapter's folder or from here."""
    return _on_this_machine(Path(folder), read_config(folder).get("base_model_name_or_path"))


def named_base(folder: Path) -> tuple[str | None, Path | None]:
    """What an adapter of any of peft's types names as its base, and where that lies on this machine, if it does.

    Raises CheckpointError for a damaged `adapter_config.json`.
    """
    path = Path(folder) / CONFIG
    try:
        named = json.loads(path.read_text()).get("base_model_name_or_path") or None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the configuration is damaged ({error})") from None
    return named, _on_this_machine(Path(folder), named)


def _on_this_machine(folder: Path, named: str | None) -> Path | None:
    places = [folder / named, Path(named).expanduser()] if named else []
    return next((place for place in places if (place / "config.json").is_file()), None)


def name_base(folder: Path, base: Path | None) -> None:
    """Let the adapter in `folder` name its base by its full path; nothing is changed where `base` is None."""
    if base is not None:
        config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": str(base.resolve())}
        atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_lora(folder: Path) -> Lora:
    """The adapter in a folder, from its configuration and the header of its file.

    Raises RequestError for kinds of adapters that are not a sum with their base, CheckpointError for damaged files.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / LORA
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected {LORA} beside {CONFIG}, found none")
    headers = read_file_headers(path)
    changes: dict[str, tuple[Change, ...]] = {}
    whole: dict[str, str] = {}
    for name in headers:
        module, kind, rest = _parts(name)
        if kind in ("lora_A", "lora_embedding_A"):
            other = name.replace(kind, kind[:-1] + "B")
            if other not in headers:
                raise CheckpointError(f"{path}: expected {other} beside {name}, found none")
            targets = config.get("target_parameters") or ()
            check_linear(module, targets, folder)
            called = f"{module}.weight" if meant(f"{module}.weight", targets) else module
            factors = _factors(config, called, name, other, headers, kind == "lora_embedding_A")
            changes[f"{module}.weight"] = (_turning(factors, headers) if config.get("use_dora") else factors,)
        elif kind is None:
            whole[rest] = name
        elif kind not in ("lora_B", "lora_embedding_B", MAGNITUDE if config.get("use_dora") else None):
            raise RequestError(
                f"{path}: expected pairs lora_A and lora_B, found {name}: fold the adapter into its base first"
            )
    return Lora(folder, config, changes, whole, headers)


def meant(name: str, targets: Sequence[str]) -> bool:
    """Whether peft's `target_parameters` name this parameter."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def check_linear(module: str, targets: Sequence[str], folder: Path) -> None:
    """Raises RequestError for a module of which `target_parameters` name something else than its `weight`."""
    holders = [target.rpartition(".")[0] for target in targets if target.rpartition(".")[2] != "weight"]
    if any(f".{module}".endswith(f".{holder}" if holder else ".experts") for holder in holders):
        raise RequestError(
            f"{folder}: expected LoRA on linear layers, found it on parameters of {module}, which hold several "
            "experts: read it with its model ({adapt: {peft: …}}) and fold it there (`fold: true`)"
        )


def _parts(name: str) -> tuple[str, str | None, str]:
    """(module, `lora_A` or the like, None for a tensor of the base; its name there)."""
    inner = name.removeprefix(START).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    if match := re.match(r"(.*?)\.(lora_[a-zA-Z_]+?)(\.weight)?$", inner):
        return match[1], match[2], ""
    if "lora_" in inner or "trainable_tokens" in inner:
        return inner, "other", ""
    return "", None, re.sub(r"\.default\.", ".", inner)


def _factors(config: Mapping[str, Any], module: str, a: str, b: str, headers: Headers, embedding: bool) -> Factors:
    shape_a, shape_b = headers[a].shape, headers[b].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise RequestError(
            f"{headers[a].file}: expected factors of a matrix, found {a} {list(shape_a)} and {b} {list(shape_b)}"
        )
    rank = shape_a[0]
    return Factors(a, b, rank, scale_of(config, module, rank), embedding or bool(config.get("fan_in_fan_out")))


def _turning(factors: Factors, headers: Headers) -> Turning:
    """What DoRA makes of factors. Raises RequestError for embeddings, CheckpointError where lengths are missing."""
    if "lora_embedding_A" in factors.a:
        raise RequestError(f"{headers[factors.a].file}: DoRA on embeddings ({factors.a}): fold it into its base first")
    module = factors.a.partition("lora_A")[0]
    found = [name for name in (f"{module}{MAGNITUDE}", f"{module}{MAGNITUDE}.weight") if name in headers]
    if not found:
        raise CheckpointError(f"{headers[factors.a].file}: expected {module}{MAGNITUDE} beside {factors.a}, found none")
    return Turning((factors,), found[0], 1.0, int(factors.transposed))


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies B·A by in this module: α / rank, or α / √rank (rsLoRA); α by the first pattern that the end
    of the module's path matches."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = (alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = next(matching, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def new_rows(lora: Lora, base: Headers, tokens: int | None) -> int | None:
    """Rows of the embeddings that an adapter holds whole, where they are not those of its base's `tokens`."""
    for name, own in lora.whole.items():
        there = stands_for(name, base)
        before, after = base[there].shape if there else (), lora.headers[own].shape
        if before[:1] == (tokens,) and before[1:] == after[1:] and before != after:
            return after[0]
    return None


def add_to(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter added to its weights, in place: worked out in float32, cast once.

    Raises RequestError for what the adapter changes and the model does not have.
    """
    import torch
    from safetensors.torch import load_file

    found, own = read_lora(folder), load_file(Path(folder) / LORA)
    now = {
        name: TensorHeader(name, "F32", tuple(t.shape), found.folder, 0, 0) for name, t in model.state_dict().items()
    }
    rows = new_rows(found, now, getattr(model.config.get_text_config(), "vocab_size", None))
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name, stored in found.whole.items():
            _untied(model, name).copy_(own[stored])
        for name, changes in found.changes.items():
            weight = _untied(model, name)
            for change in changes:
                weight.copy_(_added(weight.float(), change, own))
    return model


def _added(weight: Tensor, change: Change, own: Mapping[str, Tensor]) -> Tensor:
    """A weight [rows, columns], float32, with a change of an adapter in the form of peft."""
    if isinstance(change, Turning):
        turned = _added(weight, change.parts[0], own)
        factor = own[change.magnitude].float().to(weight.device) / turned.norm(dim=1 - change.axis)
        return turned * (factor[:, None] if change.axis == 0 else factor)
    assert isinstance(change, Factors)
    product = change.scale * (own[change.b].float() @ own[change.a].float()).to(weight.device)
    square = product.shape[0] == product.shape[1]
    return weight + (product.T if product.shape != weight.shape or (change.transposed and square) else product)


def _untied(model: PreTrainedModel, name: str) -> Tensor:
    """The parameter of this name; one that is the same as another becomes one of its own."""
    import torch

    module_name, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        weight = getattr(module, last)
    except AttributeError:
        raise RequestError(
            f"expected {name}, which the adapter changes, found none in {type(model).__name__}"
        ) from None
    if name in (getattr(model, "all_tied_weights_keys", None) or {}):
        weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(module, last, weight)
        model.config.tie_word_embeddings = False
    return weight


def stands_for(name: str, headers: Headers) -> str | None:
    """The name that a checkpoint has for a tensor of the model; headless checkpoints leave out its first part."""
    if name in headers:
        return name
    short = name.partition(".")[2]
    if short in headers:
        return short
    longer = [known for known in headers if known.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None
