"""The page in a real browser: it shows the picture, keeps itself current, chats, and runs nothing that it is told.

Skipped where playwright or Chromium is missing: pip install 'tensorweave[browser]', and Debian's chromium.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from tensorweave.router.admin.access import AdminKeys
from tensorweave.router.http.app import build_app
from tests.router.admin.small_admin import HOST, SmallAdmin, gang, pool, rank, router_metrics
from tests.router.admin.test_access import KEY, digests
from tests.router.calls import scripted
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import make_service

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tensorweave[browser]'")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium, as Debian's package chromium"),
]

PATIENCE_MS = 60_000
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
GAUGES = {"kv_blocks": 100.0, "kv_blocks_used": 30.0, "kv_blocks_cached": 50.0, "generation_tokens_total": 1000.0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        # Without its sandbox: it is root in CI, and opens nothing but our page.
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, admin: SmallAdmin, **options: Any) -> Iterator[Any]:
    """The page in a tab of its own. Whatever the browser complains of is a failure, refused scripts included."""
    complaints: list[str] = []
    with listening(admin.app) as url:
        context = browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.locator("#health.badge.ok, #health.badge.bad").wait_for()
        yield page
        context.close()
    assert complaints == []


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_MS / 1000)


def admin_of(*links: FakeLink, **options: Any) -> SmallAdmin:
    decode = gang("d-0.2", rank(0, **GAUGES), rank(1, **GAUGES))
    sick = {"gang_id": "d-1.4", "state": "restarting", "epoch": 4, "reason": EVIL, "starting": ""}
    fault = {"time_s": 900.0, "gang_id": "d-1.3", "kind": "fault", "text": EVIL}
    pools = [pool("p", gang("p-0.1", rank(0)), role="prefill"), pool(EVIL, decode, sick, num_faults=1, events=[fault])]
    transport = httpx.ASGITransport(app=build_app(make_service(*links))) if links else None
    admin = SmallAdmin(*pools, transport=transport, **options)
    admin.routers.note(router_metrics().report("r-1"))
    return admin


def expect(locator: Any, text: str) -> None:
    playwright.expect(locator).to_contain_text(text, timeout=PATIENCE_MS)


def test_it_shows_the_picture_and_what_changes(browser: Any) -> None:
    admin = admin_of()
    with opened(browser, admin) as page:
        body = page.locator("main")
        for text in (
            "1 of 2 gangs ready",
            "d-0.2",
            f"1: {HOST}, pid 4001",
            "30 used, 50 cached of 100",
            "1 faults of gangs",
        ):
            expect(body, text)
        expect(body, "r-1")
        expect(body, "onerror")  # as text
        assert page.locator("main img, main script").count() == 0
        admin.pools = [pool("main", gang("m-0.1", rank(0, **{**GAUGES, "kv_blocks_used": 77.0})))]
        admin.now_s += 5.0
        expect(body, "77 used, 50 cached of 100")
        assert page.locator("#charts svg polyline").count() == 3
        admin.pools = None
        admin.now_s += 5.0
        expect(page.locator("header"), "the supervisor does not answer")
        assert page.title() == "tensorweave"


def test_a_chat_through_the_endpoint(browser: Any) -> None:
    with opened(browser, admin_of(scripted(f"Paris. {EVIL}"))) as page:
        page.locator("#question").fill("Where?")
        page.locator("#question").press("Enter")
        expect(page.locator("#talk .assistant"), f"Paris. {EVIL}")
        expect(page.locator("#talk .user"), "Where?")
        playwright.expect(page.locator("#send")).to_be_enabled(timeout=PATIENCE_MS)
        assert page.locator("#talk img, #talk script, #talk .error").count() == 0
        assert page.title() == "tensorweave"


def test_a_chat_is_stopped(browser: Any) -> None:
    link = scripted("word " * 200, faults=[Fault("stall", after=20)])  # it would be over before the click
    with listening(build_app(make_service(link))) as endpoint, opened(browser, admin_of(endpoint=endpoint)) as page:
        page.locator("#question").fill("Talk")
        page.locator("#send").click()
        expect(page.locator("#talk .assistant"), "word")
        page.locator("#stop").click()
        playwright.expect(page.locator("#send")).to_be_enabled(timeout=PATIENCE_MS)
        assert page.locator("#talk .error").count() == 0
    assert link.cancelled, "the request has ended too"


def test_the_password_is_an_admin_key(browser: Any) -> None:
    admin = admin_of(keys=AdminKeys(digests(KEY), has_api_keys=True))
    with opened(browser, admin, http_credentials={"username": "admin", "password": KEY}) as page:
        expect(page.locator("main"), "1 of 2 gangs ready")
