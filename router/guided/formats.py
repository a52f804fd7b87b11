"""JSON Schema's formats as regular expressions: what is generated for each.

Each is a subset of its standard's language that every validator accepts: no leap seconds, no time zones of 24 hours, no
host name over its total length. Both backends have formats of their own; those of xgrammar generate 31 November.
"""

from __future__ import annotations

from typing import Final

_YEAR: Final = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR: Final = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE: Final = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DAYS: Final = r"(?:[0-9]{1,9}D|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?)"
_CLOCK: Final = r"T(?:[0-9]{1,9}S|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?)"
_ATOM: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]{1,30}"
_LABEL: Final = r"(?:[A-Za-z0-9]-?){0,30}[A-Za-z0-9]"
_LAST_LABEL: Final = r"[A-Za-z](?:-?[A-Za-z0-9]){0,30}"
_HOSTNAME: Final = rf"(?:{_LABEL}\.){{0,3}}{_LAST_LABEL}"
_DOMAIN: Final = rf"(?:{_LABEL}\.){{1,3}}[A-Za-z]{{2,30}}"
_BYTE: Final = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}"
_HEX4: Final = r"[0-9A-Fa-f]{1,4}"
_IPV6: Final = "|".join(
    [
        rf"(?:{_HEX4}:){{7}}{_HEX4}",
        rf"(?:{_HEX4}:){{1,7}}:",
        *(rf"(?:{_HEX4}:){{1,{7 - n}}}(?::{_HEX4}){{1,{n}}}" for n in range(1, 7)),
        rf":(?::{_HEX4}){{1,7}}",
        "::",
    ]
)
_URL_CHAR: Final = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2})"
_PATH: Final = rf"(?:/{_URL_CHAR}*)*"
_QUERY: Final = rf"(?:\?(?:{_URL_CHAR}|[/?])*)?(?:#(?:{_URL_CHAR}|[/?])*)?"
_AUTHORITY: Final = rf"//(?:{_HOSTNAME}|{_IPV4})(?::[0-9]{{1,4}})?"
_URI: Final = rf"[A-Za-z][A-Za-z0-9+.\-]*:(?:{_AUTHORITY}{_PATH}|/(?:{_URL_CHAR}+{_PATH})?|{_URL_CHAR}+{_PATH}){_QUERY}"
_SEGMENT: Final = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=@]|%[0-9A-Fa-f]{2})+"
_POINTER: Final = r"(?:/(?:[ !#-.0-\[\]-}]|~[01])*)*"
_UUID: Final = "[0-9A-Fa-f]{{8}}-[0-9A-Fa-f]{{4}}-{}[0-9A-Fa-f]{{3}}-[89ABab][0-9A-Fa-f]{{3}}-[0-9A-Fa-f]{{12}}"
_BASE64: Final = r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"

FORMATS: Final[dict[str, str]] = {
    "base64url": r"(?:[A-Za-z0-9_\-]{4})*(?:[A-Za-z0-9_\-]{2}==|[A-Za-z0-9_\-]{3}=)?",
    "base64": _BASE64,
    "byte": _BASE64,
    "date": _DATE,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|[0-9]{{1,9}}W)",
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,3}}@{_DOMAIN}",
    "guid": r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": rf"{_IPV4}|{_IPV6}",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]?)(?:#|{_POINTER})",
    "time": _TIME,
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|(?:{_AUTHORITY}{_PATH}|/(?:{_URL_CHAR}+{_PATH})?|{_SEGMENT}{_PATH})?{_QUERY})",
    **{f"uuid{version}": _UUID.format(version) for version in "1345678"},
    "uuid": r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
}

UNBOUND_FORMATS: Final = frozenset({"binary", "directory-path", "file-path", "password", "path"})
"""Formats of OpenAPI and pydantic that restrict no string."""

FORMATS_OF_PATTERNS: Final = frozenset(
    {
        "cidrv4",
        "cidrv6",
        "cuid",
        "cuid2",
        "e164",
        "emoji",
        "jwt",
        "ksuid",
        "lowercase",
        "nanoid",
        "ulid",
        "uppercase",
        "xid",
    }
)
"""zod's names for expressions that it writes beside them as `pattern`, which is enforced."""

UNBOUND_ENCODINGS: Final = frozenset({"7bit", "8bit", "binary"})
"""Values of contentEncoding that restrict no string."""

NUMBER_FORMATS: Final[dict[str, tuple[int, int] | None]] = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "float": None,
    "double": None,
}
"""OpenAPI's formats of numbers, with their bounds."""

KNOWN_PATTERNS: Final[dict[str, str]] = {
    # zod's e-mail address, whose lookaheads forbid a dot at the beginning and two dots in a row
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+\-]@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
    # pydantic's decimal number, whose lookahead forbids one without digits
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+\-]?(?:\d+\.?\d*|\.\d+)$",
}
"""Expressions with lookaround that widely used libraries write, each with an equal one without."""
