"""Who may use the admin port: every route needs an admin key, or a request from this host that no foreign page made."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx
import pytest
from fastapi import Request, Response
from starlette.routing import Route

from tensorweave.router.admin.access import AdminKeys
from tests.router.admin.small_admin import SmallAdmin, pool

KEY, OTHER = "the-admin-key", "the-other-admin-key"
API_KEY = "a-clients-key"


async def _change(request: Request) -> Response:
    return Response(status_code=204)


ROUTES = [Route("/v1/change", _change, methods=["POST"])]


def digests(*keys: str) -> list[str]:
    return [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" for key in keys]


def admin(keys: AdminKeys) -> SmallAdmin:
    return SmallAdmin(pool("main"), keys=keys, routes=ROUTES)


def ask(admin: SmallAdmin, method: str, path: str, base_url: str = "http://127.0.0.1:8200", **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return admin.run(lambda client: client.request(method, path, headers=names), base_url=base_url)


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"admin:{key}".encode()).decode()


def all_routes() -> list[tuple[str, str]]:
    found = [
        (method, route.path)
        for route in admin(AdminKeys()).app.routes
        for method in sorted(route.methods or ())  # type: ignore[attr-defined]
    ]
    return [*found, ("GET", "/nowhere"), ("OPTIONS", "/status"), ("DELETE", "/status"), ("GET", "/status/")]


def test_the_routes_are_those_that_we_think_of() -> None:
    paths = {path for _, path in all_routes()}
    assert paths >= {"/", "/page.js", "/page.css", "/status", "/health", "/metrics", "/chat", "/openapi.json"}
    assert ("POST", "/v1/change") in all_routes()


@pytest.mark.parametrize(("method", "path"), all_routes())
def test_every_route_needs_an_admin_key(method: str, path: str) -> None:
    keyed = admin(AdminKeys(digests(KEY, OTHER), has_api_keys=True))
    closed = admin(AdminKeys((), has_api_keys=True))
    shown = [{"authorization": f"Bearer {KEY}"}, {"x_api_key": OTHER}, {"authorization": basic(KEY)}]
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": f"Bearer {API_KEY}"},
        {"authorization": basic(API_KEY)},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(KEY.encode()).decode()},  # as the user's name
        {"authorization": f"Digest {KEY}"},
        {"x_api_key": ""},
    ]
    for headers in shown:
        assert ask(keyed, method, path, **headers).status_code not in (401, 403)
    for service, given in [(keyed, wrong), (closed, [*wrong, *shown])]:
        for headers in given:
            answer = ask(service, method, path, **headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["www-authenticate"].startswith("Basic realm=")
            assert answer.headers["connection"] == "close"
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
            assert KEY not in answer.text


def test_a_service_without_admin_keys_says_what_to_set() -> None:
    answer = ask(admin(AdminKeys((), has_api_keys=True)), "GET", "/status")
    assert "security.admin_keys" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("base_url", "status"),
    [
        ("http://127.0.0.1:8200", 200),
        ("http://127.9.9.9", 200),
        ("http://localhost:1", 200),
        ("http://[::1]:8200", 200),
        ("http://evil.example.org:8200", 403),  # made to resolve to this host
        ("http://10.0.0.9", 403),
        ("http://127.0.0.1.evil.org", 403),
    ],
)
def test_without_keys_only_this_hosts_own_names_are_answered(base_url: str, status: int) -> None:
    assert ask(admin(AdminKeys()), "GET", "/status", base_url).status_code == status
    with_key = ask(admin(AdminKeys(digests(KEY))), "GET", "/status", base_url, x_api_key=KEY)
    assert with_key.status_code == 200, "a key is enough under any name"


def test_the_name_that_the_port_listens_on_is_its_own() -> None:
    named = admin(AdminKeys(host="head.cluster"))
    assert ask(named, "GET", "/status", "http://head.cluster:8200").status_code == 200


@pytest.mark.parametrize("keys", [AdminKeys(), AdminKeys(digests(KEY))])
@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({"origin": "http://127.0.0.1:8200", "sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "none"}, True),
        ({"origin": "https://evil.example.org"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "null"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"}, False),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, False),
    ],
)
def test_another_origins_page_changes_and_reads_nothing(
    keys: AdminKeys, headers: dict[str, str], is_let_in: bool
) -> None:
    answer: httpx.Response = ask(admin(keys), "POST", "/v1/change", authorization=basic(KEY), **headers)
    assert answer.status_code == (204 if is_let_in else 403)
    assert "access-control-allow-origin" not in answer.headers


def test_a_link_on_another_page_may_lead_here() -> None:
    answer = ask(admin(AdminKeys()), "GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert answer.status_code == 200
