"""Talking with a model: with its tokenizer's chat template where there is one, else by plain continuation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft import models
from graft.errors import RequestError


class Talk:
    """A conversation. `reply` streams the answer to the next thing said; what was said before is remembered."""

    def __init__(self, model: Path | str, *, system: str | None = None, device: str | None = None, hub: bool = False):
        self.tokenizer = models.load_tokenizer(model, hub=hub)
        models.check_device(device)
        self.model = models.load(model, device=device, hub=hub)
        if not self.model.can_generate():
            raise RequestError(f"{model}: expected a model that generates text, found {type(self.model).__name__}")
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        if system and not self.templated:
            raise RequestError(f"{model}: its tokenizer has no chat template, so that `system` says nothing to it")

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def reply(
        self, said: str, *, max_tokens: int = 200, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the answer as they are made. `temperature` 0: always the likeliest token."""
        from transformers import TextIteratorStreamer, set_seed

        inputs = self._inputs(said)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        generate_from: Any = self.model.generate

        def generate() -> None:
            try:
                settings: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, **sampling}
                pad = self.tokenizer.pad_token_id
                settings["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
                generate_from(**inputs, **settings, streamer=streamer)
            except BaseException as error:  # noqa: BLE001  (handed to the thread that listens)
                failed.append(error)
                streamer.end()

        set_seed(seed)
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        if failed:
            raise failed[0]
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _inputs(self, said: str) -> dict[str, Any]:
        self.messages.append({"role": "user", "content": said})
        if self.templated:
            found: Any = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            found = self.tokenizer(said, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        if found["input_ids"].shape[1] == 0:
            raise RequestError("expected some text to go on from, found none")
        return {name: found[name].to(self.model.device) for name in names}
