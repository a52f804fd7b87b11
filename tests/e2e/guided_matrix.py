"""A long run: answers held to schemas as people send them, many seeds each: the same tokens however they are served.

    python -m tests.e2e.guided_matrix --model tiny --seeds 50
    nice python -m tests.e2e.guided_matrix --model smollm2 --seeds 50 --ways ranks pair

Every answer that ends with "stop" must validate, and none may be filled with blanks; each way of serving must give the
tokens of the plain one. Prints a line of JSON per way, and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import jsonschema

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.report_channel import open_report_channel
from tensorweave.workers.guided.guides import RankGuides
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.store.model_store import resolve_model
from tests.e2e.test_guided_equal import SharedTrials
from tests.llmapi.small_llm import write_small_model
from tests.router.guided.matchers import validator
from tests.workers.transfer_drive import Answer, Client, Gang, model_gang, request_pair, tcp_carriers

SCHEMAS: Final = Path(__file__).parents[1] / "router" / "guided" / "data" / "real_schemas.json"
REAL: Final[list[dict[str, Any]]] = json.loads(SCHEMAS.read_text())
CACHE: Final = {"max_tokens": 30_000}
WAYS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "ranks": {"size": 2},
    "chunks": {"max_num_tokens": 32},
    "preempted": {"policy": "MAX_UTILIZATION", "kv_cache_config": {"max_tokens": 4096}},
    "pair": {"make_carrier": tcp_carriers},
}
SCHEMAS_AT_ONCE: Final = 8
ANSWERS_TIMEOUT_S: Final = 3600.0
_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"?')
_BLANKS: Final = re.compile(r"\s{9}")
"""More white space between two elements than a guide allows."""


@dataclass(frozen=True)
class Served:
    """A model, and what its gangs share."""

    path: Path
    tokenizer: Tokenizer
    trials: Trials
    max_tokens: int

    @property
    def end_id(self) -> int:
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    def gang(self, name: str, *, size: int = 1, make_carrier: Any = None, **knobs: Any) -> Gang:
        return model_gang(
            self.path,
            size,
            make_carrier,
            name=name,
            make_guides=self._make_guides,
            **{"kv_cache_config": CACHE, **knobs},
        )

    def _make_guides(self, comm: Comm) -> RankGuides:
        return RankGuides(comm.rank, comm.size, self.trials, open_report_channel(comm, "127.0.0.1"))

    def requests(self, case: dict[str, Any], seeds: range) -> list[GenerateRequest]:
        asked = f"Give me an example of {case['name'].replace('_', ' ')} as JSON."
        prompt = self._prompt(asked)
        guide = guide_for(GuideParams(json=case["schema"]))
        return [
            GenerateRequest(
                f"{case['name']}-{seed}",
                prompt,
                SamplingSpec(self.max_tokens, temperature=1.0, seed=seed, stop_token_ids=(self.end_id,), guide=guide),
            )
            for seed in seeds
        ]

    def _prompt(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(text)
        return self.tokenizer.chat(ChatPrompt([{"role": "user", "content": text}]))


def serve(served: Served, way: str, asked: Sequence[GenerateRequest]) -> tuple[list[Answer], float]:
    """The answers, and the number of preemptions."""
    with ExitStack() as gangs:
        gang = gangs.enter_context(served.gang("decode", **WAYS[way]))
        prefill = gangs.enter_context(served.gang("prefill", **WAYS[way])) if way == "pair" else None
        answers: list[Answer] = []
        at_once = SCHEMAS_AT_ONCE * len(asked) // len(REAL)
        for first in range(0, len(asked), at_once):
            answers += _answers(gang, prefill, asked[first : first + at_once])
        return answers, gang.leader.gauges()["num_preemptions_total"]


def _compile(gang: Gang, requests: Sequence[GenerateRequest]) -> None:
    """Until the gang has all the requests' grammars. On a busy machine a trial may be late, and is tried again."""
    waiting = list({request.sampling.guide: request for request in requests}.values())
    num_asked = 0
    while waiting:
        num_asked += 1
        asked = replace(
            waiting[0], request_id=f"compile-{num_asked}", sampling=replace(waiting[0].sampling, max_tokens=1)
        )
        gang.leader.enqueue_request(asked)
        chunks: list[TokenChunk] = []
        while not any(chunk.is_last for chunk in chunks):
            chunks += gang.leader.await_responses(timeout_s=1.0)
        if chunks[-1].error is None:
            waiting.pop(0)
        else:
            assert isinstance(chunks[-1].error, NotReady), chunks[-1].error


def _answers(gang: Gang, prefill: Gang | None, requests: Sequence[GenerateRequest]) -> list[Answer]:
    for each in (gang, prefill):
        if each is not None:
            _compile(each, requests)
    if prefill is None:
        client = Client(gang)
        return client.wait(gang.leader.enqueue_requests(requests), ANSWERS_TIMEOUT_S)
    client, names = Client(gang, prefill), []
    for request in requests:
        offered, fetched = request_pair(request.request_id, request.prompt_token_ids, request.sampling, prefill.source)
        prefill.leader.enqueue_request(offered)
        names.append(gang.leader.enqueue_request(fetched))
    return client.wait(names, ANSWERS_TIMEOUT_S)


def wrong_in(served: Served, case: dict[str, Any], answer: Answer) -> str:
    """What is wrong with the form of an answer, if anything."""
    ends = answer.finish_reason == "stop"
    text = served.tokenizer.decode(answer.tokens[: -1 if ends else None], skip_special_tokens=False)
    if _BLANKS.search(_STRINGS.sub("s", text)):
        return f"blanks: {text!r}"
    if not ends:
        return "" if answer.finish_reason == "length" else f"ended by {answer.finish_reason}"
    try:
        validator(case["schema"]).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"
    return ""


@contextmanager
def open_model(name: str, max_tokens: int) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        path = write_small_model(Path(directory)) if name == "tiny" else resolve_model(name)
        tokenizer = Tokenizer.load(path)
        trials = SharedTrials(TokenizerSource(str(path)), load_model_config(path).sizes.vocab_size)
        try:
            _await_vocabulary(trials)
            yield Served(path, tokenizer, trials, max_tokens)
        finally:
            trials.close_at_last()


def _await_vocabulary(trials: SharedTrials) -> None:
    """Also on a machine that is so busy that reading the tokenizer takes minutes."""
    for _ in range(10):
        with contextlib.suppress(NotReady):
            trials.vocabulary()
            return
    trials.vocabulary()


def main() -> None:
    args = _arguments()
    num_wrong = 0
    with open_model(args.model, args.max_tokens) as served:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        cases = [case for case in REAL for _ in seeds]
        asked = [request for case in REAL for request in served.requests(case, seeds)]
        plain: list[Answer] = []
        for way in ["plain", *(way for way in args.ways if way != "plain")]:
            began_s = time.monotonic()
            answers, num_preemptions = serve(served, way, asked)
            plain = plain or answers
            wrong = [text for pair in zip(cases, answers, strict=True) if (text := wrong_in(served, *pair))]
            other = [
                f"{request.request_id} from token {_first_difference(one.tokens, answer.tokens)}"
                for request, one, answer in zip(asked, plain, answers, strict=True)
                if one.tokens != answer.tokens or one.finish_reason != answer.finish_reason
            ]
            num_wrong += len(wrong) + len(other)
            figures = {
                "way": way,
                "answers": len(answers),
                "stop": sum(answer.finish_reason == "stop" for answer in answers),
                "tokens": sum(len(answer.tokens) for answer in answers),
                "wrong": len(wrong),
                "other_tokens": len(other),
                "examples": [text[:200] for text in (*wrong[:3], *other[:3])],
                "preemptions": num_preemptions,
                "minutes": round((time.monotonic() - began_s) / 60, 1),
            }
            print(json.dumps(figures), flush=True)
    sys.exit(num_wrong > 0)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="'tiny' is random, with a small tokenizer")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0, help="a long run in parts")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
