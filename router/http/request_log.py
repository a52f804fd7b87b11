"""`RequestLog`: one log line per request (`logging.requests`), with tokens and times, and nothing of what was said."""

from __future__ import annotations

import logging
from typing import Any

from tensorweave.router.http.request_record import RequestRecord

logger = logging.getLogger("tensorweave.requests")


class RequestLog:
    def __init__(self) -> None:
        logger.setLevel(logging.INFO)  # it was asked for, whatever the level of the other lines

    def record(self, request: RequestRecord) -> None:
        fields = fields_of(request)
        text = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, "", []))
        logger.info("request %s", text, extra={"fields": fields})

    def close(self) -> None:
        return None


def fields_of(request: RequestRecord) -> dict[str, Any]:
    attempts = [attempt for timeline in request.timelines for attempt in timeline.attempts]
    gangs = dict.fromkeys(gang for each in attempts for gang in (each.prefill_gang, each.decode_gang) if gang)
    queued_s = [
        timeline.admitted_s - timeline.asked_s
        for timeline in request.timelines
        if timeline.admitted_s is not None and timeline.asked_s is not None
    ]
    first_s = None if request.first_token_s is None else request.first_token_s - request.began_s
    return {
        "request_id": request.request_id,
        "path": request.path,
        "status": request.status,
        "error": request.error_code,
        "model": request.model,
        "stream": request.is_streamed,
        "sequences": len(request.timelines),
        "prompt_tokens": request.num_prompt_tokens,
        "cached_tokens": request.num_cached_tokens,
        "output_tokens": request.num_output_tokens,
        "finish": ",".join(request.finish_reasons),
        "queue_s": round(max(queued_s), 4) if queued_s else None,
        "ttft_s": None if first_s is None else round(first_s, 4),
        "duration_s": round(request.duration_s, 4),
        "attempts": len(attempts),
        "gangs": ",".join(gangs),
    }
