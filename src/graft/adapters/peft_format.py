"""peft's folders (`adapter_config.json`, `adapter_model.safetensors`), read and written without peft.

LoRA (with rank and alpha patterns, rsLoRA, DoRA), mixtures of it (X-LoRA), (IA)³, prefix tuning and prompt tuning of
decoders. Each side loads what the other wrote and gives the same logits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from graft import models
from graft.adapters.folder import fill
from graft.adapters.foreign import HOLDER, save_foreign
from graft.adapters.forms import ExpertLowRank, LowRank
from graft.adapters.keys import KeySite, TokenSite
from graft.adapters.mixture import Mixer
from graft.adapters.peft_experts import as_parameters, read_factors, standing_at, written_factors
from graft.adapters.peft_files import CONFIG, WEIGHTS, Weights, read_settings, read_weights
from graft.adapters.peft_mixture import read_mixture, written
from graft.adapters.point import Point
from graft.adapters.stack import Adapters, adapters_of, adopt
from graft.checkpoint import read_file_headers
from graft.disk import atomic_write, disk_errors
from graft.errors import CheckpointError, RequestError
from graft.lora import scale_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""What peft puts before the name of a module of the frozen model."""


def load_peft(
    folder: Path | str,
    *,
    base: Path | str | None = None,
    name: str = "adapter",
    dtype: Any = None,
    device: str | None = None,
) -> PreTrainedModel:
    """The frozen model with the adapter of a peft folder. `base` is its folder, if not what the adapter's says.

    Raises RequestError for a kind of adapter that graft has no point for, CheckpointError for damaged weights.
    """
    folder = Path(folder)
    config = read_settings(folder)
    place = Path(base or config.get("base_model_name_or_path") or "")
    if not (place / "config.json").is_file():
        raise RequestError(
            f"{folder}: expected the folder of the model it was trained on (base=…), found none at {place}"
        )
    model = models.load(place, dtype=dtype, device=device)
    adopt_peft(model, folder, name, base=place)
    return model


def adopt_peft(model: PreTrainedModel, folder: Path, name: str, *, base: Path | None = None) -> Adapters:
    """Put the adapter of a peft folder into `model` (in place), frozen."""
    config = read_settings(folder)
    if config.get("peft_type") == "XLORA":
        stack, classifier, held = read_mixture(model, config, folder, name, base, adopt_peft)
        fill(classifier, held, folder / WEIGHTS)
        model.requires_grad_(False)
        return stack
    raw = read_weights(folder)
    read = {"LORA": _read_lora, "IA3": _read_ia3, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
    kind = str(config.get("peft_type"))
    if kind not in read:
        raise RequestError(
            f"{folder}: expected one of {', '.join(read)}, XLORA, found {kind}, which graft has no point for: load it "
            "with peft"
        )
    points, weights = read[kind](model, config, raw, folder)
    try:
        stack = adopt(model, points, name, base=base)
    except RequestError as error:
        raise RequestError(f"{folder}: this adapter is for another model: {error}") from None
    named = {key.replace("/", "."): value for key, value in weights(stack.sites[name]).items()}
    fill(stack.sites[name], named, folder / WEIGHTS)
    model.requires_grad_(False)
    return stack


def lora_points(model: PreTrainedModel, folder: Path) -> list[Point]:
    """The points that the LoRA in a peft folder is in `model`, from its configuration and the header of its weights."""
    config, headers = read_settings(folder), read_file_headers(folder / WEIGHTS)
    shapes = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    return _read_lora(model, config, shapes, folder)[0]


# -- reading ----------------------------------------------------------------------------------------------------------


def _modules(weights: Weights, ending: str, folder: Path) -> dict[str, torch.Tensor]:
    """Path of the module → tensor, for all tensors whose name has this ending."""
    found = {name[len(PREFIX) : -len(ending)]: value for name, value in weights.items() if name.endswith(ending)}
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS}: expected tensors named {PREFIX}….{ending.strip('.')}, found none")
    return found


def _known(weights: Weights, endings: tuple[str, ...], folder: Path) -> None:
    strange = [name for name in weights if not name.startswith(PREFIX) or not name.endswith(endings)]
    if strange:
        raise RequestError(
            f"{folder / WEIGHTS}: expected tensors of the adapter alone, found {', '.join(strange[:3])}: whole "
            "modules, biases and embeddings beside an adapter are not read"
        )


def _read_lora(model: Any, config: Mapping[str, Any], raw: Weights, folder: Path) -> Any:
    start = config.get("init_lora_weights")
    changed = isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq")
    if changed or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise RequestError(
            f"{folder}: expected LoRA on an unchanged model, found init_lora_weights {start!r}, bias "
            f"{config.get('bias')!r}, modules_to_save {config.get('modules_to_save')!r}: convert it with peft first"
        )
    _known(raw, (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"), folder)
    groups: dict[tuple[int, float], list[str]] = {}
    standing: dict[str, str] = {}
    for path, tensor in _modules(raw, ".lora_A.weight", folder).items():
        place, experts, called = standing_at(model, path, config.get("target_parameters") or (), folder)
        scale = scale_of(config, called, len(tensor) // (experts or 1))
        raw = raw if experts else _no_wider(raw, f"{PREFIX}{path}")
        standing[path], rank = place, len(raw[f"{PREFIX}{path}.lora_A.weight"]) // (experts or 1)
        groups.setdefault((rank, scale), []).append(place)
    points = [
        Point(form="linear", on=paths, composition="scaled", scale=scale, size=rank,
              directions=bool(config.get("use_dora")), dropout=float(config.get("lora_dropout") or 0.0))
        for (rank, scale), paths in groups.items()
    ]  # fmt: skip
    names = {".lora_A.weight": ".down", ".lora_B.weight": ".up", ".lora_magnitude_vector": ".magnitude"}
    renamed = {
        standing.get(path := name[len(PREFIX) : -len(theirs)], path) + ours: value
        for name, value in raw.items()
        for theirs, ours in names.items()
        if name.endswith(theirs)
    }
    return points, lambda sites: read_factors(sites, renamed, folder)


def _no_wider(raw: Weights, path: str) -> Weights:
    """The weights with the change at `path` in as many ranks as its layer is wide, where peft gave it more."""
    a, b = (raw.get(f"{path}.lora_{part}.weight") for part in "AB")
    if a is None or b is None or len(a) <= min(a.shape[1], len(b)):
        return raw
    product = b.float() @ a.float()
    eye = torch.eye(min(product.shape))
    pair = (product, eye) if len(b) < a.shape[1] else (eye, product)
    return {**raw, f"{path}.lora_A.weight": pair[0].to(a.dtype), f"{path}.lora_B.weight": pair[1].to(b.dtype)}


def _read_ia3(model: Any, config: Mapping[str, Any], raw: Weights, folder: Path) -> Any:
    _known(raw, (".ia3_l",), folder)
    factors = _modules(raw, ".ia3_l", folder)
    inner = [path for path, factor in factors.items() if factor.dim() == 2 and factor.shape[0] == 1]
    outer = [path for path in factors if path not in inner]
    on = [*outer, *(f"before {path}" for path in inner)]
    before = {path: "/before" if path in inner else "" for path in factors}
    weights = {f"{path}{before[path]}.factor": factor.flatten() - 1 for path, factor in factors.items()}
    return [Point(form="scale", insertion="after", on=on)], lambda sites: weights


def _read_prefix(model: Any, config: Mapping[str, Any], raw: Weights, folder: Path) -> Any:
    table = _prompt(config, raw, folder)
    point = Point(form="softmax", on=["attention"], size=len(table), gate=False, shift=True)

    def weights(sites: Any) -> dict[str, torch.Tensor]:
        keyed = list(sites.items())
        heads, _, size = keyed[0][1].keys.shape
        if table.numel() != len(table) * 2 * len(keyed) * heads * size:
            expected = [len(table), 2 * len(keyed) * heads * size]
            raise RequestError(
                f"{folder}: expected a prefix of shape {expected} for this model, found {list(table.shape)}"
            )
        # [layer and key or value, heads, tokens, size]
        layers = table.view(len(table), 2 * len(keyed), heads, size).permute(1, 2, 0, 3)
        pairs = zip(keyed, layers[0::2], layers[1::2], strict=True)
        return {f"{key}.{part}": value for (key, _), k, v in pairs for part, value in (("keys", k), ("values", v))}

    return [point], weights


def _read_prompt(model: Any, config: Mapping[str, Any], raw: Weights, folder: Path) -> Any:
    table = _prompt(config, raw, folder)
    point = Point(form="tokens", on=["input"], size=len(table), gate=False)
    return [point], lambda sites: {"input.embeddings": table}


def _prompt(config: Mapping[str, Any], raw: Weights, folder: Path) -> torch.Tensor:
    if set(raw) != {"prompt_embeddings"}:
        raise CheckpointError(
            f"{folder / WEIGHTS}: expected prompt_embeddings alone, found {', '.join(sorted(raw)[:4])}"
        )
    if config.get("num_transformer_submodules", 1) not in (1, None):
        raise RequestError(f"{folder}: prefixes and prompts are read for decoders, found one for an encoder–decoder")
    return raw["prompt_embeddings"]


# -- writing ----------------------------------------------------------------------------------------------------------


def save_peft(
    model: PreTrainedModel, folder: Path | str, name: str | None = None, *, seen_from: Path | None = None
) -> None:
    """Write one adapter of `model` (the active one, if not named) as peft would.

    `seen_from` is where the folder will stand, if elsewhere: a mixture says where its experts lie.

    The weight of the active one becomes part of a LoRA's alpha. Raises RequestError for points that peft has no type
    for, and for a weight other than 1 of what is no plain LoRA.
    """
    folder, stack = Path(folder), adapters_of(model)
    if stack is None and HOLDER in model.__dict__:
        save_foreign(model, folder)
        return
    if stack is None:
        raise RequestError("expected a model with adapters to write, found none")
    pairs = [(name, 1.0)] if name else stack.active
    names = [one for one, _ in pairs]
    if len(names) != 1 or names[0] not in stack.points:
        raise RequestError(f"expected the name of one adapter, found {names}; there are: {', '.join(stack.points)}")
    times = pairs[0][1]
    if times != 1 and not all(_is_lora(site) and not site.point.directions for site in stack.sites[names[0]].values()):
        raise RequestError(
            f"expected an adapter with the weight 1, since peft has others for plain LoRA only, found {times:g} × "
            f"{names[0]}: leave the weight out, keep graft's own folder, or fold it"
        )
    mixers = [site for site in stack.sites[names[0]].values() if isinstance(site, Mixer)]
    if mixers:
        for number, expert in enumerate(mixers[0].point.of):
            save_peft(model, folder / str(number), expert)
    config, weights = written(mixers[0], seen_from or folder) if mixers else _written(model, stack, names[0], times)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    usual = {
        "base_model_name_or_path": str(stack.base.resolve()) if stack.base else None,
        "inference_mode": True,
        "task_type": None if "MaskedLM" in type(model).__name__ else kind,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        held = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    atomic_write(folder / CONFIG, json.dumps({**usual, **config}, indent=2, sort_keys=True) + "\n")


def _written(
    model: PreTrainedModel, stack: Adapters, name: str, times: float
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    sites: Any = list(stack.sites[name].values())
    points = stack.points[name]
    if all(map(_is_lora, sites)):
        return _write_lora(model, sites, times)
    if all(point.form == "scale" and point.composition == "add" for point in points):
        return _write_ia3(sites)
    decodes = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
    if decodes and len(points) == 1 and isinstance(sites[0], KeySite) and not points[0].gate and points[0].shift:
        return _write_prefix(model, sites)
    if decodes and len(points) == 1 and isinstance(sites[0], TokenSite) and not points[0].gate:
        table, said = sites[0].embeddings, model.config.get_text_config()
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(table), "token_dim": table.shape[1],
                  "num_transformer_submodules": 1, "num_layers": said.num_hidden_layers,
                  "num_attention_heads": said.num_attention_heads}  # fmt: skip
        return config, {"prompt_embeddings": table}
    forms = ", ".join(sorted({f"{p.form} {p.insertion}" for p in points}))
    raise RequestError(
        f"{name}: expected LoRA, (IA)³, or on a decoder prefix or prompt tuning with `gate: false`, which peft has, "
        f"found {forms} on {type(model).__name__}: keep graft's own folder, or fold it"
    )


def _is_lora(site: Any) -> bool:
    if not isinstance(site, LowRank | ExpertLowRank):
        return False
    point = site.point
    plain = point.composition in ("add", "scaled") and point.insertion == "parallel" and point.scale != "learned"
    return plain and (site.place.single or isinstance(site, ExpertLowRank))


def _write_lora(
    model: PreTrainedModel, sites: list[LowRank | ExpertLowRank], times: float
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if len(turned := {site.point.directions for site in sites}) > 1:
        raise RequestError("peft has DoRA at all places of an adapter or at none: keep graft's own folder, or fold it")
    experts = [site for site in sites if isinstance(site, ExpertLowRank)]
    weights, layers = written_factors(experts, PREFIX), as_parameters(model, sites)
    ranks = {site.place.path: site.down.shape[1] for site in experts}
    alphas = {site.place.path: float(site.scale) * times * site.down.shape[1] for site in experts}
    for site in sites:
        if isinstance(site, ExpertLowRank):
            continue
        path = f"{PREFIX}{site.place.path}"
        down: torch.Tensor = site.down
        up: torch.Tensor = site.up
        if site.point.start == "pissa":  # the product it started with is taken away by as many ranks more
            down = torch.cat([down, site.first_down])
            up = torch.cat([up, -site.first_up], 1)
        weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"] = down, up
        if site.point.directions:
            weights[f"{path}.lora_magnitude_vector"] = site.magnitude
        called = f"{site.place.path}.weight" if site.place.path in layers else site.place.path
        ranks[called], alphas[called] = len(down), float(site.scale) * times * len(down)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    parameters = {*(site.place.path for site in experts), *(f"{path}.weight" for path in layers)}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
        "target_modules": sorted(set(ranks) - parameters),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
        "use_dora": turned.pop(), "use_rslora": False,
        # peft has none beside parameters
        "lora_dropout": 0.0 if parameters else sites[0].point.dropout,
        "fan_in_fan_out": type(sites[0].module).__name__ == "Conv1D",
    }  # fmt: skip
    return config, weights


def _write_ia3(sites: list[Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weights = {
        f"{PREFIX}{site.place.path}.ia3_l": (1 + site.factor)[None] if site.place.before else (1 + site.factor)[:, None]
        for site in sites
    }
    inner = sorted(site.place.path for site in sites if site.place.before)
    config = {
        "peft_type": "IA3", "target_modules": sorted(site.place.path for site in sites), "feedforward_modules": inner,
        "fan_in_fan_out": type(sites[0].module).__name__ == "Conv1D",
    }  # fmt: skip
    return config, weights


def _write_prefix(model: PreTrainedModel, sites: list[KeySite]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    layers = model.config.get_text_config().num_hidden_layers
    shapes = {tensor.shape for site in sites for tensor in (site.keys, site.values)}
    if len(shapes) > 1 or len(sites) != layers:
        sizes = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise RequestError(
            f"expected keys and values of one shape in each of {layers} layers, which peft's prefixes have, found them "
            f"in {len(sites)}, of {sizes}: keep graft's own folder"
        )
    both = torch.stack([tensor for site in sites for tensor in (site.keys, site.values)])
    heads, count, size = sites[0].keys.shape
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": count, "token_dim": heads * size,
        "num_attention_heads": heads, "num_layers": len(sites), "num_transformer_submodules": 1,
        "prefix_projection": False, "encoder_hidden_size": heads * size,
    }  # fmt: skip
    return config, {"prompt_embeddings": both.permute(2, 0, 1, 3).reshape(count, -1)}
