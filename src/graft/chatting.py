"""Talking with a model: with its tokenizer's chat template where there is one, else by plain continuation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft import models
from graft.errors import RequestError
from graft.prefix_lm import prefix_lms
from graft.progress import say


class Talk:
    """A conversation. `reply` streams the answer to the next thing said; what was said before is remembered, as far as
    the model can read it."""

    def __init__(self, model: Path | str, *, system: str | None = None, device: str | None = None, hub: bool = False):
        from graft.ensemble.configuration import context_of

        if Path(model).is_dir():
            models.check_asked([Path(model)])
        self.tokenizer = models.load_tokenizer(model, hub=hub)
        models.check_device(device)
        self.model = models.load(model, device=device, hub=hub)
        if not self.model.can_generate():
            raise RequestError(f"{model}: expected a model that generates text, found {type(self.model).__name__}")
        self.context = context_of(self.model.config.to_dict())
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

        inputs = self._inputs(said, max_tokens)
        if self.context is not None and not self.model.config.is_encoder_decoder:
            max_tokens = min(max_tokens, self.context - inputs["input_ids"].shape[1])
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        generate_from: Any = self.model.generate

        def generate() -> None:
            try:
                settings: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, **sampling}
                pad = self.tokenizer.pad_token_id
                settings["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
                settings |= {"prompt_tokens": self._read_both_ways(inputs)} if prefix_lms(self.model) else {}
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

    def _inputs(self, said: str, max_tokens: int) -> dict[str, Any]:
        import torch

        self.messages.append({"role": "user", "content": said})
        ids = self._ids()
        if not ids:
            raise RequestError("expected some text to go on from, found none")
        room, whole = self._room(max_tokens), len(ids)
        if room is not None and whole > room:
            ids = self._forget(room)
            say(
                f"what was said is {whole} tokens long, and the model reads {self.context}, the answer included: the "
                f"oldest {whole - len(ids)} are left out"
            )
        given = torch.tensor([ids], device=self.model.device)
        return {"input_ids": given, "attention_mask": torch.ones_like(given)}

    def _ids(self) -> list[int]:
        # how long it may be is looked at here, so that the tokenizer need not warn of it
        if not self.templated:
            return self.tokenizer(self.messages[-1]["content"], verbose=False)["input_ids"]
        found = self._written(self.messages)
        end = self.tokenizer.eos_token_id
        marked = self.model.config.is_encoder_decoder and end is not None  # as what an encoder reads is in training
        return [*found, end] if marked else found

    def _written(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as the template writes it for the assistant to go on."""
        found: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        return found

    def _read_both_ways(self, inputs: dict[str, Any]) -> int:
        """Tokens that a prefix LM reads both ways: as in training, those before the assistant's first turn."""
        roles = [message["role"] for message in self.messages]
        if not self.templated or "assistant" not in roles:
            return int(inputs["input_ids"].shape[1])
        return len(self._written(self.messages[: roles.index("assistant")]))

    def _room(self, max_tokens: int) -> int | None:
        """Tokens that what was said may have, half of the context at least; None where no limit is known."""
        if self.context is None or self.model.config.is_encoder_decoder:
            return self.context
        return self.context - min(max_tokens, self.context // 2)

    def _forget(self, room: int) -> list[int]:
        """Leave out the oldest messages, and of the last one its beginning; the ids of what is left, `room` at most.

        The system message stays. Raises RequestError where it leaves no room.
        """
        if not self.templated:
            return self._end(room)
        first = int(self.messages[0]["role"] == "system")
        while len(ids := self._ids()) > room and len(self.messages) > first + 1:
            del self.messages[first]
            while self.messages[first]["role"] != "user":
                del self.messages[first]
        last = self.messages[-1]
        while len(ids) > room and last["content"]:
            last["content"] = self._without(last["content"], len(ids) - room)
            ids = self._ids()
        if len(ids) > room:
            raise RequestError(
                f"the system message and the chat template take {len(ids)} tokens, and the model reads {self.context}, "
                "the answer included: expected a shorter system message"
            )
        return ids

    def _end(self, room: int) -> list[int]:
        """The last ids of a text without a template, behind the start token where the tokenizer puts one."""
        from graft.evaluate.limits import puts_start

        ids = self._ids()
        start = ids[: int(puts_start(self.tokenizer))]
        return [*start, *ids[len(ids) - room + len(start) :]]

    def _without(self, text: str, tokens: int) -> str:
        """A text without its first tokens; it is cut between characters, at least one is gone."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in found["offset_mapping"]]
        return text[max(1, starts[tokens]) :] if tokens < len(starts) else ""
