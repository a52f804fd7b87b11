"""The HTTP front end over a scripted model, for clients that run agents: python -m tests.clients.scripted_service PORT.

The model does what the last message of the user tells it (`tests/router/scripted_model.py`).
"""

from __future__ import annotations

import sys
from dataclasses import replace

import uvicorn

from tensorweave.router.http.app import build_app
from tests.router.scripted_model import ScriptedLink
from tests.router.serving import make_service, model_info
from tests.router.small_tokenizers import hermes

NAME = "scripted"


def main() -> None:
    port = int(sys.argv[1])
    link = ScriptedLink(model_info(max_seq_len=32_768), hermes())
    app = build_app(replace(make_service(link, tokenizer=hermes()), model_name=NAME))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
