"""`tensorweave chat`: a terminal client of a running service; streams answers and keeps the conversation.

Speaks plain OpenAI chat completions, so it works with any such server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

import httpx

from tensorweave.cli.arguments import add_api_key, bearer
from tensorweave.cli.sse import error_message, event_data, event_reasoning, event_text
from tensorweave.cluster.errors import TensorweaveError

CONNECT_TIMEOUT_S: Final = 5.0
_EXAMPLES = """\
examples:
  tensorweave chat
  tensorweave chat --message "What is the capital of France?"
  tensorweave chat --url http://10.0.0.5:8000 --system "Answer in French." --temperature 0.7

In a chat: /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.
"""


class ChatFailed(TensorweaveError):
    """The server could not be reached, or did not answer the request."""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running service",
        description="Talk to a running service from the terminal.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
    parser.add_argument("--model", help="model name (default: the first that the service lists)")
    add_api_key(parser)
    parser.add_argument("--message", help="send this one message, print the answer and leave")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence, in seconds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    headers = bearer(args.api_key)
    timeout = httpx.Timeout(args.timeout, connect=CONNECT_TIMEOUT_S)
    with httpx.Client(base_url=args.url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout) as client:
        conversation = Conversation(client, args.model or first_model(client), args.system)
        options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        if args.message is not None:
            print_answer(conversation.ask(args.message, options), sys.stdout)
            return 0
        print(f"{conversation.model} at {client.base_url}; /reset forgets, /exit or Ctrl-D leaves", file=sys.stderr)
        return _talk(conversation, options)


class Conversation:
    """The messages so far. A failed or interrupted request does not change them."""

    def __init__(self, client: httpx.Client, model: str, system: str | None = None) -> None:
        self.model = model
        self._client = client
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def ask(self, text: str, options: dict[str, Any]) -> Iterator[str]:
        """Yield pieces of the answer as they arrive, those of its reasoning first.

        Raises:
            ChatFailed: no connection, an error answer, an error in the stream, or a stream that ends too early.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "stream": True, **options}
        answer = ""
        with _failures_named(self._client), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            _check(response)
            is_over = is_thinking = False
            for line in response.iter_lines():
                event = event_data(line) or {}
                if "error" in event:
                    raise ChatFailed(error_message(event, "the answer ended early"))
                is_over = is_over or any(choice.get("finish_reason") for choice in event.get("choices") or ())
                if thought := event_reasoning(event):
                    is_thinking = True
                    yield thought
                if piece := event_text(event):
                    answer += piece
                    yield f"\n\n{piece}" if is_thinking else piece
                    is_thinking = False
        if not is_over:
            raise ChatFailed("the connection ended before the answer did")
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def first_model(client: httpx.Client) -> str:
    with _failures_named(client):
        response = client.get("/v1/models")
        _check(response)
        listed = response.json()["data"]
    if not listed:
        raise ChatFailed(f"{client.base_url} serves no model")
    return str(listed[0]["id"])


def print_answer(pieces: Iterator[str], out: TextIO) -> None:
    for piece in pieces:
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def _talk(conversation: Conversation, options: dict[str, Any]) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            conversation.reset()
        elif text:
            _answer(conversation, text, options)


def _answer(conversation: Conversation, text: str, options: dict[str, Any]) -> None:
    pieces = conversation.ask(text, options)
    try:
        print_answer(pieces, sys.stdout)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator: closing it ends the request
        print("\n(stopped; this message is forgotten)", file=sys.stderr)
    except ChatFailed as error:
        print(f"\n{error}", file=sys.stderr)


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = None
    message = error_message(body, response.text[:200])
    retry = response.headers.get("Retry-After")
    raise ChatFailed(f"HTTP {response.status_code}: {message}" + (f" (try again in {retry} s)" if retry else ""))


@contextlib.contextmanager
def _failures_named(client: httpx.Client) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise ChatFailed(f"cannot reach {client.base_url} ({error}); start a service with `make serve`") from None
    except httpx.TimeoutException:
        raise ChatFailed(f"{client.base_url} was silent for too long; --timeout S waits longer") from None
    except httpx.HTTPError as error:
        raise ChatFailed(f"the connection to {client.base_url} failed: {error}") from None
    except httpx.InvalidURL as error:
        raise ValueError(f"--url: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ChatFailed(f"{client.base_url} does not speak OpenAI's protocol: {error}") from None
