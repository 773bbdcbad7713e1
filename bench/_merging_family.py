"""A family of Llama-shaped models with random weights in bfloat16, for measuring merges: time depends on no weight."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft.checkpoint import TensorReader, TensorWriter, weight_files

VOCABULARY, PIECE = 32000, 1 << 22
WIDTHS = {"0.1B": (768, 2048, 8), "0.4B": (1024, 2816, 25), "1.1B": (2048, 5632, 22), "3B": (3072, 8192, 26)}
"""Hidden size, width of the MLP, layers; 1.1B is the shape of TinyLlama."""
SPREAD, STEP = 0.02, 0.001
"""Standard deviations of the base's weights and of what tuning changed."""


def bytes_of(size: str) -> int:
    """Bytes of the weights of one model."""
    return sum(2 * torch.Size(shape).numel() for _, shape in _layout(_config(size)).values())


def family(root: Path, size: str, count: int) -> dict[str, Path]:
    """`base` and `count` models near it: name → folder. What is there already is used again."""
    config = _config(size)
    names = ["base", *(f"m{i}" for i in range(count))]
    folders = {name: root / size / name for name in names}
    for seed, (name, folder) in enumerate(folders.items()):
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _weights(folder, config, seed, None if name == "base" else folders["base"])
            (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
            _tokenizer().save_pretrained(folder)
            (folder / "finished").touch()
    return folders


def files_of(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    return weight_files(folder)


def _config(size: str) -> LlamaConfig:
    hidden, mlp, layers = WIDTHS[size]
    heads = hidden // 64
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 8, 1), dtype="bfloat16",
        tie_word_embeddings=False,
    )  # fmt: skip


def _layout(config: LlamaConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
    return {name: ("BF16", tuple(value.shape)) for name, value in made.state_dict().items()}


def _weights(folder: Path, config: LlamaConfig, seed: int, base: Path | None) -> None:
    layout = _layout(config)
    writer = TensorWriter(folder, layout)
    reader = TensorReader(base) if base is not None else None

    def fill(item: tuple[int, str]) -> None:
        place, name = item
        draw = torch.Generator().manual_seed(seed * len(layout) + place)
        count = torch.Size(layout[name][1]).numel()
        for start in range(0, count, PIECE):
            length = min(PIECE, count - start)
            values = torch.randn(length, generator=draw).mul_(SPREAD if reader is None else STEP)
            if reader is not None:
                values += reader.read(name, start, length).float()
            writer.write(name, 2 * start, memoryview(values.bfloat16().view(torch.uint8).numpy()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, enumerate(layout)))
    writer.close()
    if reader is not None:
        reader.close()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{place}": place for place in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")
