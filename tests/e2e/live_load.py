"""Clients of a service that changes meanwhile, and the models that their answers must follow."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

_TIMEOUT_S = 400.0
_TIE = 1e-5
"""Logits as near as this may be in either order: the engine adds in another order than the plain model."""


@dataclass(frozen=True)
class Answer:
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    began_s: float
    ended_s: float


class Load:
    """Clients that ask one after another, `pause_s` after an answer, until told to stop. An answer that is not whole is
    in `failures`."""

    def __init__(self, port: int, num_clients: int) -> None:
        self.prompt_tokens, self.output_tokens, self.pause_s = 1, 1, 0.0
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(n,)) for n in range(num_clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_S)
            assert not thread.is_alive(), "a request hangs"

    def _ask_on(self, client: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            ids = random.Random(client * 1_000_003 + number).choices(range(3, 200), k=self.prompt_tokens)
            try:
                self.answers.append(ask(self._port, ids, self.output_tokens))
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self._stop.wait(self.pause_s)


@contextmanager
def loaded(port: int, num_clients: int, prompt_tokens: int, output_tokens: int) -> Iterator[Load]:
    load = Load(port, num_clients)
    load.prompt_tokens, load.output_tokens = prompt_tokens, output_tokens
    load.start()
    try:
        yield load
    finally:
        load.close()


def ask(port: int, prompt: Sequence[int], num_tokens: int) -> Answer:
    """Raises OSError, HTTPException, or ValueError for an answer that is not whole."""
    began_s = time.monotonic()
    wanted = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = {"model": "tiny", "prompt": list(prompt), **wanted}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{response.status}: {text[:300]!r}")
    token_ids = tuple(json.loads(text)["choices"][0]["token_ids"])
    if len(token_ids) != num_tokens:
        raise ValueError(f"{len(token_ids)} tokens of {num_tokens}")
    return Answer(tuple(prompt), token_ids, began_s, time.monotonic())


class PlainModel:
    """A checkpoint in transformers."""

    def __init__(self, path: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def gives(self, answer: Answer) -> bool:
        """Whether each token is the most likely one after all before it."""
        ids = torch.tensor([[*answer.prompt, *answer.token_ids[:-1]]])
        logits_TV = self._model(ids).logits[0, len(answer.prompt) - 1 :]  # T answer tokens, V vocabulary
        chosen_T = logits_TV.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        return bool((chosen_T >= logits_TV.max(dim=1).values - _TIE).all())
