"""A model's folder <-> a torch model. Never pickles, never remote code, never the network unless `hub=True`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import remembered
from graft.adapters.facts import adapter_of_head, check_base, entry_of
from graft.checkpoint import ADAPTER, Headers, read_file_headers, read_headers
from graft.disk import disk_errors
from graft.errors import CheckpointError, RequestError, closest
from graft.finite import check_folder, check_loaded
from graft.fitting import OLD_NAMES, architecture_of, beyond, misfits
from graft.folders import ADAPTED, ENSEMBLES, OWN, folders_behind, read_config
from graft.hashing import hash_file
from graft.hub import fetch
from graft.lineage import check_as_made, read_manifest
from graft.lora import add_to, base_folder, is_lora
from graft.pickles import is_pickled, pickled_files
from graft.prefix_lm import write_as_trained
from graft.vocabulary import GENERAL_TOKENIZERS, TOKENIZER_FILES, token_ids, tokenizer_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SHARD_BYTES = 5 * 10**9
Empty = Callable[[], AbstractContextManager[Any]]


def check_device(name: str | None) -> None:
    """Raises RequestError for a device that this machine does not have; None, the best there is, is always right."""
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        why = str(error).splitlines()[0]
        raise RequestError(f"expected a device of this machine ({', '.join(there)}), found {name!r}: {why}") from None


def load_config(path: str | Path, *, hub: bool = False) -> PretrainedConfig:
    """The configuration of a folder, or of a hub id where `hub` allows the network.

    Raises RequestError where there is none and CheckpointError for one that is damaged.
    """
    from transformers import AutoConfig

    path = _place(path, hub)
    said = read_config(Path(_home(path)))
    if _is_ours(path):
        _register()
    if why := unknown_type(said):
        raise RequestError(f"{path} {why}")
    config = AutoConfig.from_pretrained(_home(path), local_files_only=True, trust_remote_code=False)
    return _frozen_config(config) if config.model_type == ADAPTED else config


def load_tokenizer(path: str | Path, *, hub: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id. Raises RequestError where it has none, CheckpointError for a damaged one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = _place(path, hub)
    # for some model types the Auto class takes the type's own tokenizer, whatever the folder says it was saved from
    path = path if (Path(path) / "tokenizer.json").is_file() else _home(path)
    chosen = PreTrainedTokenizerFast if _saved_class(path) in GENERAL_TOKENIZERS else AutoTokenizer
    try:
        tokenizer = chosen.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each way of being damaged has an error of its own
        if token_ids(Path(path)) is not None:
            file = Path(path) / "tokenizer.json"
            raise CheckpointError(f"{file}: expected a tokenizer, found a damaged file ({error!r})") from error
        why = f" that loads ({error})" if any(any(Path(path).glob(name)) for name in TOKENIZER_FILES) else ""
        raise RequestError(f"{path}: expected a tokenizer (tokenizer.json), found none{why}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(f"{path}: expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    return tokenizer  # type: ignore[return-value]


def _saved_class(folder: str | Path) -> str | None:
    path = Path(folder) / "tokenizer_config.json"
    try:
        return json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None
    except ValueError as error:
        raise RequestError(f"{path}: expected JSON, found a damaged file ({error})") from None


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    hub: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """The model of a folder (or hub id), of the class its configuration names, in evaluation mode.

    `dtype` None keeps the stored one. `quantization`: a configuration of transformers to pack plain weights by.
    Raises RequestError for a folder that is no model's and CheckpointError for weights that are truncated, corrupt,
    missing, NaN or Inf, of another shape than the configuration says, or others than the folder's manifest tells of.
    `generate` of a prefix LM reads prompts both ways, as in training (`prefix_lm.py`).
    """
    return write_as_trained(_loaded(_place(path, hub), dtype, device, quantization))


def _loaded(path: Path, dtype: str | torch.dtype | None, device: str | None, quantization: Any) -> PreTrainedModel:
    import torch

    check_as_made(path)
    if is_lora(path):
        added = add_to(load(_home(path), dtype=dtype, device=device), path)
        check_loaded(added, path)
        return added
    config = load_config(path)
    if (path / ADAPTER).is_file():
        from graft.adapters.folder import load as load_adapted

        return load_adapted(path, dtype=dtype, device=device)
    if adapter_of_head(path) is not None:
        from graft.multitask.adapted import load_head

        return load_head(path, dtype=dtype, device=device)
    if config.model_type not in OWN:
        check_fit(path, read_headers(path))
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # packed weights are made where they shall be: they cannot be moved on every device
    quantised = quantization is not None or getattr(config, "quantization_config", None) is not None
    packed: dict[str, Any] = {"device_map": {"": device or "cpu"}} if quantised else {}
    if quantised:  # what is packed cannot be looked at in memory
        check_folder(path)
    if quantization is not None:
        packed["quantization_config"] = quantization
    try:
        with no_bars():
            model, info = model_class(config).from_pretrained(
                path,
                dtype=wanted or "auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **packed,
            )
    except ImportError as error:
        raise RequestError(f"{path}: {error}") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the weights do not load: {error}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: expected {type(model).__name__} weights, missing {len(missing)}: {', '.join(missing[:5])}"
        )
    if quantised:
        _exact_on_cpu(model)
        return model.eval()
    if config.model_type not in OWN:
        check_loaded(model, path)
    return model.to(device).eval() if device else model.eval()


def _exact_on_cpu(model: Any) -> None:
    """Let layers in 4 bits compute in the type they say: where the CPU can, bitsandbytes would pack them once more, for
    arithmetic in bfloat16 and sizes that are multiples of 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def model_class(config: PretrainedConfig) -> Any:
    """The `transformers` class that a configuration names, else the Auto class of its kind."""
    import transformers

    name = next(iter(config.architectures or ()), None)
    own = getattr(transformers, name, None) if name else None
    if own is not None:
        return own
    if config.model_type == "graft_ensemble":
        from graft.ensemble.model import ensemble_class

        return ensemble_class(config)  # type: ignore[arg-type]
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def without_memory() -> AbstractContextManager[Any]:
    """Models that are made meanwhile have no memory behind their weights."""
    import torch

    return torch.device("meta")


def made_empty(config: PretrainedConfig, empty: Empty = without_memory) -> PreTrainedModel:
    """The model of a configuration, without memory behind its weights."""
    made = model_class(config)
    with empty():
        return made.from_config(config) if hasattr(made, "from_config") else made(config)


def check_stored(folder: Path) -> None:
    """`check_fit` of all folders behind a model, before anything is loaded: from headers, and looked at only once; and
    that adapters stand on the weights they were made for.

    Raises CheckpointError as that does.
    """
    for place in folders_behind(folder):
        if (place / ADAPTER).is_file():
            said = entry_of(place)
            check_base(place, said, place / said["base"]["path"])
        if not any(place.glob("model*.safetensors")) or _as_saved(place) or is_lora(place):
            continue
        headers = read_headers(place)
        told = [[name, header.shape] for name, header in sorted(headers.items())]
        about = json.dumps([metadata.version("transformers"), hash_file(place / "config.json"), told])
        if remembered.recall("fits", about) is None:
            check_fit(place, headers)
            remembered.keep("fits", about, "yes")


def check_asked(folders: Iterable[Path], *, loads: bool = True) -> None:
    """That the models which a request names can be read, before any work: configurations, manifests, tokenizers and
    headers of all folders behind them; with `loads` also that weights fit their configurations and manifests, and that
    ensembles' members are what they were.

    Raises RequestError with all that is damaged, or that is no model.
    """
    wrong: list[str] = []
    for folder in folders:
        try:
            for place in folders_behind(folder):
                _check_files(place)
                if loads:
                    check_as_made(place)
                    _check_members(place)
            if loads:
                check_stored(folder)
        except (RequestError, CheckpointError) as error:
            wrong.append(str(error))
    if wrong:
        raise RequestError("\n".join(dict.fromkeys(wrong)))


def _check_files(folder: Path) -> None:
    """What can be known of a folder's files without reading a tensor. Raises CheckpointError for a damaged one."""
    read_manifest(folder)
    tokenizer_of(folder)
    if is_pickled(folder):
        pickled_files(folder)
    elif is_lora(folder) or read_config(folder).get("model_type") not in OWN:
        read_headers(folder)
    else:
        for file in folder.glob("*.safetensors"):
            read_file_headers(file)


def _check_members(folder: Path) -> None:
    if not is_lora(folder) and read_config(folder).get("model_type") in ENSEMBLES:
        from graft.ensemble.members import check_members

        check_members(folder)


def _as_saved(folder: Path) -> bool:
    """Whether a configuration is, by its hash in the manifest, the one that the weights were made with."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.config == hash_file(folder / "config.json")


def check_fit(folder: Path, headers: Headers) -> None:
    """That weights have the names and shapes that the configuration beside them says.

    A configuration that is, by its hash in the manifest, the one they were made with is not asked. What is packed, or
    converted while it is loaded, is not looked at. Raises CheckpointError naming what does not fit.
    """
    if is_lora(folder) or _as_saved(folder):
        return
    from transformers import CONFIG_MAPPING

    said = read_config(folder)
    kind = str(said.get("model_type"))
    old = any(OLD_NAMES.search(name) for name in headers)
    if kind in OWN or kind not in CONFIG_MAPPING or said.get("quantization_config") or old:
        return
    try:
        model = made_empty(load_config(folder))
    except Exception:  # noqa: BLE001  (whatever keeps it from being built is told by who loads it)
        return
    made, stored = architecture_of(model), {name: header.shape for name, header in headers.items()}
    if made.converted:
        return
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    more = [name for name in beyond(made, stored) if not any(re.search(pattern, name) for pattern in ignored)]
    wrong = misfits(made, stored) + ([f"no block for {len(more)}: {', '.join(more[:5])}"] if more else [])
    if wrong:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json, which says {made.name}: {'; '.join(wrong)}; put there the "
            "configuration that was saved with these weights"
        )


def unknown_type(config: Mapping[str, Any]) -> str:
    """What keeps `transformers` from making a model of a configuration: a type that it does not know; else empty."""
    kind, version = str(config.get("model_type", "")), metadata.version("transformers")
    if kind in OWN or remembered.recall("type", f"{version} {kind}") is not None:
        return ""
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        remembered.keep("type", f"{version} {kind}", "yes")
        return ""
    return (
        f"is of the model_type {kind!r}, which transformers {version} does not know: install a version that does, or "
        "correct config.json; code that lies beside weights is not run"
    )


def _frozen_config(config: Any) -> PretrainedConfig:
    """The configuration of the frozen model below adapters, of its own class."""
    from transformers import AutoConfig

    plain = {name: value for name, value in config.to_dict().items() if name not in (ADAPTED, "model_type")}
    return AutoConfig.for_model(config.graft_adapted["model_type"], **plain)


def _home(path: str | Path) -> str | Path:
    """Where configuration and tokenizer are: an adapter's are its base's. Raises RequestError for a lost base."""
    if not is_lora(path):
        return path
    base = base_folder(Path(path))
    if base is None:
        raise RequestError(f"{path}: expected an adapter whose base is on this machine, found one that names another")
    return base


def _place(path: str | Path, hub: bool) -> Path:
    """The folder itself, or where the model of that id lies once it has been fetched."""
    if Path(path).is_dir():
        return Path(path)
    if hub:
        return fetch(str(path))
    raise RequestError(
        f"{path}: expected a model's folder, found none{nearest_folder(Path(path))}; one on the hub needs the network "
        "allowed: `hub=True` (--hub)"
    )


def nearest_folder(path: Path) -> str:
    """`" (did you mean 'models/doctor'?)"` where a model with a name close to the last part of `path` lies in the same
    place, else an empty string."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    there = sorted(each.name for each in beside if (each / "config.json").is_file() or is_lora(each))
    close = closest(path.name, there)
    return f" (did you mean {str(path.parent / close)!r}?)" if close else ""


def _is_ours(path: str | Path) -> bool:
    """Whether the folder says that it holds a model of graft's own making: only these need its classes."""
    place = Path(path) / "config.json"
    return place.is_file() and '"graft_' in place.read_text(errors="replace")


def _register() -> None:
    """Make the classes of ensembles and adapters known to the Auto classes, which a model in any folder may need."""
    import importlib.util

    import graft.adapters.auto

    if importlib.util.find_spec("graft.ensemble.model"):
        import graft.ensemble.model  # noqa: F401


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of `transformers`, shown for every small file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a complete model folder: configuration, safetensors, generation configuration, tokenizer."""
    with disk_errors(folder), no_bars():
        model.save_pretrained(folder, max_shard_size=shard_bytes)
        if getattr(model, "can_generate", lambda: False)():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
