"""Every route of the HTTP app: answers, errors, streaming, metrics, health."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from tensorweave.cluster.errors import LogitsNotFinite, Overloaded, WorkerLost
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.http.app import build_app
from tensorweave.router.http.health import check_health
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.calls import CHAT, COMPLETIONS, TEXT, check_error, get, post, scripted
from tests.router.fake_fleet import FakeFleet, FakeLink, Fault
from tests.router.serving import (
    MODEL,
    ONE_ATTEMPT,
    chat,
    client_of,
    completion,
    events_of,
    make_app,
    make_service,
    model_info,
    script_of,
)
from tests.router.small_tokenizers import byte_level

# ---- answers


def test_chat_answer() -> None:
    link = scripted(num_cached=3)
    answer = post(CHAT, chat(), link)
    assert answer.status_code == 200
    body = answer.json()
    prompt = link.requests[0].prompt_token_ids
    assert byte_level().decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    out = len(script_of(TEXT))
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": out,
        "total_tokens": len(prompt) + out,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    sampling = link.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, 512 - len(prompt))


def test_completion_answer_and_its_defaults() -> None:
    link = FakeLink(model_info())
    body = post(COMPLETIONS, completion("The capital"), link).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16
    assert list(link.requests[0].prompt_token_ids) == byte_level().encode("The capital")


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_chat_stream(tokens_per_step: int) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    answer = post(CHAT, body, scripted(tokens_per_step=tokens_per_step))
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(script_of(TEXT))
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


def test_completion_stream_has_no_usage_unless_asked() -> None:
    *chunks, done = events_of(post(COMPLETIONS, completion(stream=True, max_tokens=50), scripted()).text)
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_running_usage() -> None:
    """Nothing is generated yet where the role is told, of each sequence; at the end it is all."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for n in (1, 2):
        body = chat(stream=True, stream_options=options, n=n, seed=1)
        *chunks, _ = events_of(post(CHAT, body, scripted(num_cached=1)).text)
        usages = [chunk["usage"] for chunk in chunks]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts[: n + 1] == [0] * n + [1]
        assert counts == sorted(counts)
        assert counts[-1] == n * len(script_of(TEXT))
        assert len({usage["prompt_tokens"] for usage in usages}) == 1
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
        assert usages[0]["prompt_tokens_details"]["cached_tokens"] == 1


@pytest.mark.parametrize("include", [{}, {"include_usage": False}, {"include_usage": None}])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETIONS, completion())])
def test_running_usage_is_a_part_of_usage(path: str, body: dict[str, Any], include: dict[str, Any]) -> None:
    options = {**include, "continuous_usage_stats": True}
    *chunks, _ = events_of(post(path, body | {"stream": True, "stream_options": options}, scripted()).text)
    assert not any("usage" in chunk for chunk in chunks)


def test_a_chats_first_chunk_has_the_prompts_ids() -> None:
    link = scripted()
    *chunks, _ = events_of(post(CHAT, chat(stream=True, return_token_ids=True, n=2, seed=1), link).text)
    assert chunks[0]["prompt_token_ids"] == list(link.requests[0].prompt_token_ids)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "token_ids" not in chunks[0]["choices"][0]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    ids = [token for chunk in chunks for c in chunk["choices"] if c["index"] == 0 for token in c.get("token_ids", ())]
    assert ids == script_of(TEXT)


def test_n_sequences_of_several_prompts() -> None:
    link = FakeLink(model_info())
    body = post(COMPLETIONS, completion(["one", "two words"], n=3, seed=7, max_tokens=5), link).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [r.sampling.seed for r in link.requests] == [7, 8, 9] * 2
    lens = [len(byte_level().encode(text)) for text in ("one", "two words")]
    assert body["usage"]["prompt_tokens"] == sum(lens)
    assert body["usage"]["completion_tokens"] == 30
    alone = post(COMPLETIONS, completion("two words", seed=8, max_tokens=5), FakeLink(model_info())).json()
    assert alone["choices"][0]["text"] == body["choices"][4]["text"]


def test_n_streams_carry_their_index() -> None:
    *chunks, _ = events_of(post(CHAT, chat(stream=True, n=3, seed=1, max_tokens=6), FakeLink(model_info())).text)
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"] == "length"]
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8]]])
def test_token_prompts(prompt: list[Any]) -> None:
    link = FakeLink(model_info())
    answer = post(COMPLETIONS, completion(prompt, max_tokens=2), link)
    assert len(answer.json()["choices"]) == len(link.requests)
    assert list(link.requests[0].prompt_token_ids) == [5, 6, 7]


def test_no_seed_means_another_one_each_time() -> None:
    link = FakeLink(model_info())
    post(COMPLETIONS, completion(["a", "a"]), link)
    assert link.requests[0].sampling.seed != link.requests[1].sampling.seed


def test_stop_string_across_tokens_ends_and_cancels() -> None:
    link = scripted("one two END three")
    body = post(COMPLETIONS, completion(stop=[" EN", "zzz"], max_tokens=50), link).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", " EN")
    assert link.cancelled == [link.requests[0].request_id]


def test_stop_token_ids_and_ignore_eos() -> None:
    link = scripted("abc")
    token = byte_level().encode("abc")[-1]
    choice = post(COMPLETIONS, completion(stop_token_ids=[token], ignore_eos=True), link).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    assert choice["text"] == byte_level().decode(byte_level().encode("abc")[:-1])
    assert link.requests[0].sampling.stop_token_ids == (token,)


def test_content_parts_and_developer_messages() -> None:
    link = scripted()
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "d", "name": "eve"},
    ]
    assert post(CHAT, {"model": MODEL, "messages": messages}, link).status_code == 200
    text = byte_level().decode(link.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")


def test_fields_that_change_nothing_are_accepted() -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "response_format": {"type": "text"},
        "tools": None,
        "stop": None,
        "seed": None,
        "best_of": 1,
        "max_tokens": 4,
    }
    assert post(CHAT, chat(**harmless), scripted()).status_code == 200


# ---- failures


def test_a_lost_gang_is_not_seen() -> None:
    """The text, the usage and the shape of the stream are those of a service without faults."""
    faults = [Fault("error", 5, closes=True)]
    for body in (chat(max_tokens=40, seed=1), chat(max_tokens=40, seed=1, stream=True, stop=["no such text"])):
        good = FakeLink(model_info(), num_cached=2)
        whole = post(CHAT, body, good)
        links = [FakeLink(model_info(), gang_id="b"), FakeLink(model_info(), faults=faults, num_cached=2)]
        answer = post(CHAT, body, *links)
        assert len(links[0].requests) == 1
        if body.get("stream"):
            assert [event["choices"] for event in events_of(answer.text)[:-1]] == [
                event["choices"] for event in events_of(whole.text)[:-1]
            ]
        else:
            assert answer.json()["choices"] == whole.json()["choices"]
            assert answer.json()["usage"] == whole.json()["usage"]


def test_a_gang_lost_time_and_again_has_its_status_before_the_first_token() -> None:
    for body in (chat(), chat(stream=True)):
        link = scripted(fail_after=0, error=WorkerLost("gang-0: rank 1 died"))
        answer = post(CHAT, body, link, limits=ONE_ATTEMPT)
        assert "rank 1" in check_error(answer, 503, None, "worker_lost")["message"]
        assert int(answer.headers["retry-after"]) >= 1


def test_a_gang_lost_time_and_again_mid_stream_is_an_error_event() -> None:
    answer = post(CHAT, chat(stream=True), scripted(fail_after=3), limits=ONE_ATTEMPT)
    assert answer.status_code == 200
    *_, last = events_of(answer.text)
    assert last["error"]["code"] == "worker_lost"


def test_a_failed_sequence_fails_all_n_and_cancels_them() -> None:
    link = FakeLink(model_info(), fail_after=4)
    check_error(post(CHAT, chat(n=4), link, limits=ONE_ATTEMPT), 503, None, "worker_lost")
    assert link.num_inflight == 0


def test_gang_refusal_passes_with_retry_after() -> None:
    link = scripted(fail_after=0, error=Overloaded("full", retry_after_s=7.2))
    answer = post(CHAT, chat(), link)
    check_error(answer, 429, None, "overloaded")
    assert answer.headers["retry-after"] == "8"


def test_no_gang_is_503() -> None:
    answer = post(CHAT, chat())
    check_error(answer, 503, None, "not_ready")
    assert "retry-after" in answer.headers


def test_internal_error_hides_its_details(caplog: pytest.LogCaptureFixture) -> None:
    for body in (chat(), chat(stream=True)):
        link = scripted(fail_after=0)
        link.error = RuntimeError("secret detail")  # type: ignore[assignment]
        answer = post(CHAT, body, link, headers={"x-request-id": "abc-1"})
        assert "secret" not in json.dumps(check_error(answer, 500, None, "internal_error"))
        assert answer.headers["x-request-id"] == "abc-1"
    assert "abc-1" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(stream: bool) -> None:
    answer = post(CHAT, chat(stream=stream, timeout_s=0.05), scripted(step_s=5), is_stepped=True)
    error = check_error(answer, 408, None, "deadline_exceeded")
    assert error["type"] == "timeout_error"


def test_deadline_after_some_tokens() -> None:
    answer = post(CHAT, chat(stream=True, timeout_s=0.3), scripted("a" * 300, step_s=0.05), is_stepped=True)
    *chunks, last = events_of(answer.text)
    assert chunks
    assert last["error"]["code"] == "deadline_exceeded"
    whole = post(CHAT, chat(timeout_s=0.3), scripted("a" * 300, step_s=0.05), is_stepped=True)
    check_error(whole, 408, None, "deadline_exceeded")


def test_the_queue_is_bounded() -> None:
    async def call() -> list[httpx.Response]:
        link = scripted(step_s=0.02)
        async with client_of(make_app(link, limits=Limits(max_inflight=2, max_queued=1))) as client:
            return list(await asyncio.gather(*(client.post(CHAT, json=chat()) for _ in range(6))))

    answers = run_stepped(call())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429, 429]
    for answer in answers:
        if answer.status_code == 429:
            check_error(answer, 429, None, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1


# ---- the small routes


def test_models_version_and_ready() -> None:
    card = get("/v1/models", scripted()).json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 512)
    assert get(f"/v1/models/{MODEL}", scripted()).json()["id"] == MODEL
    assert get("/version", scripted()).json() == {"version": "1.2.3"}
    assert get("/ready", scripted()).status_code == 200
    check_error(get("/ready"), 503, None, "not_ready")


def test_health_follows_links_and_step_loops() -> None:
    good, stalled, closed = scripted(), scripted(), scripted()
    stalled.progress_age_s = 30.0
    closed.is_open = False
    assert get("/health", good).json()["status"] == "ok"
    assert get("/health", good, stalled).status_code == 200
    answer = get("/health", stalled)
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
    assert get("/health", closed).status_code == 503
    assert get("/health").status_code == 503


def test_health_says_what_it_must_do_without() -> None:
    """Decode gangs answer alone while the prefill pool is down, and prefill gangs stand in for the decode pool."""

    class Crippled(FakeFleet):
        async def describe(self) -> list[dict[str, Any]]:
            down = {"pool": "other", "role": "prefill", "failure": "its gangs failed 5 times", "trouble": None}
            gangs = [{"gang_id": "x", "state": "stopped"}]
            return [*await super().describe(), {**down, "gangs": gangs}]

    async def run() -> None:
        for link in (FakeLink(model_info(), role="decode"), FakeLink(model_info(), role="prefill")):
            report = await check_health(Crippled(link), heartbeat_limit_s=10.0)
            assert report.body()["status"] == "ok"
            assert report.reason == "pool other: its gangs failed 5 times"
            assert [pool["pool"] for pool in report.pools] == ["main", "other"]

    asyncio.run(run())


def test_metrics() -> None:
    async def call() -> str:
        async with client_of(make_app(scripted(num_cached=2))) as client:
            await client.post(CHAT, json=chat())
            await client.post(CHAT, json=chat(n=0))
            return (await client.get("/metrics")).text

    text = asyncio.run(call())
    label = f'model_name="{MODEL}"'
    out = len(script_of(TEXT))
    for line in (
        f'tensorweave_request_success_total{{finished_reason="stop",{label}}} 1.0',
        f"tensorweave_generation_tokens_total{{{label}}} {out}.0",
        f"tensorweave_prompt_tokens_cached_total{{{label}}} 2.0",
        f"tensorweave_time_to_first_token_seconds_count{{{label}}} 1.0",
        f"tensorweave_inter_token_latency_seconds_count{{{label}}} {out - 1}.0",
        f"tensorweave_time_per_output_token_seconds_count{{{label}}} 1.0",
        f"tensorweave_e2e_request_latency_seconds_count{{{label}}} 1.0",
        f"tensorweave_num_requests_running{{{label}}} 0.0",
        f"tensorweave_num_requests_waiting{{{label}}} 0.0",
        f'tensorweave_kv_cache_usage_perc{{gang="gang-0",{label}}} 0.25',
        f'tensorweave_requests_rejected_total{{code="invalid_request",{label}}} 1.0',
        f'tensorweave_http_requests_total{{{label},path="{CHAT}",status="400"}} 1.0',
    ):
        assert line in text, line


def test_metrics_of_recovery() -> None:
    async def call() -> str:
        faults = [Fault("error", 2, closes=True)]
        links = [FakeLink(model_info(), gang_id="b"), FakeLink(model_info(), gang_id="a", faults=faults)]
        async with client_of(make_app(*links)) as client:
            await client.post(CHAT, json=chat(max_tokens=5))
            return (await client.get("/metrics")).text

    text = asyncio.run(call())
    label = f'model_name="{MODEL}"'
    for line in (
        f'tensorweave_request_retries_total{{{label},reason="worker_lost"}} 1.0',
        f'tensorweave_request_plans_total{{kind="alone",{label}}} 2.0',
        f"tensorweave_requests_recovered_total{{{label}}} 1.0",
        f"tensorweave_requests_reattached_total{{{label}}} 0.0",
        f'tensorweave_kv_transfer_bytes_total{{gang="a",{label}}} 12.0',
    ):
        assert line in text, line


def test_request_id_is_kept_if_it_is_printable() -> None:
    assert get("/version", headers={"x-request-id": "trace-7"}).headers["x-request-id"] == "trace-7"
    assert get("/version", headers={"x-request-id": "x" * 200}).headers["x-request-id"] != "x" * 200


@pytest.mark.parametrize(("given", "is_told"), [("trace-7", False), ("x" * 200, True), (None, True)])
def test_a_request_id_that_the_server_echoes_is_not_told_twice(given: str | None, is_told: bool) -> None:
    async def call() -> httpx.Response:
        async with client_of(build_app(make_service(FakeLink(model_info())), server_echoes_ids=True)) as client:
            return await client.get("/version", headers={} if given is None else {"x-request-id": given})

    told = asyncio.run(call()).headers.get_list("x-request-id")
    assert len(told) == is_told
    assert given not in told


def test_openapi_lists_the_routes() -> None:
    document = get("/openapi.json").json()
    assert {CHAT, COMPLETIONS, "/v1/models", "/health", "/metrics"} <= set(document["paths"])
    assert "temperature" in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]


def test_prompts_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    post(CHAT, chat("top secret words"), scripted())
    post(CHAT, chat("top secret words", temperature=9), scripted())
    post(CHAT, chat("top secret words"), scripted(fail_after=0, error=RuntimeError("x")))  # type: ignore[arg-type]
    assert "secret words" not in caplog.text


def test_logits_that_are_not_finite_are_the_requests_own_error() -> None:
    """It is not tried at another gang, for it may be its own prompt that gives them; the gang stays in service."""
    error = LogitsNotFinite.of_model()
    links = [scripted(gang_id=name, fail_after=0, error=error) for name in ("a", "b")]
    found = check_error(post(CHAT, chat(), *links), 500, None, "logits_not_finite")
    assert (found["type"], found["message"]) == ("server_error", error.message)
    assert sum(len(link.requests) for link in links) == 1
    assert all(link.is_open for link in links)
    streamed = post(COMPLETIONS, completion(stream=True), scripted(fail_after=2, error=error))
    assert streamed.status_code == 200
    assert events_of(streamed.text)[-1]["error"]["code"] == "logits_not_finite"
