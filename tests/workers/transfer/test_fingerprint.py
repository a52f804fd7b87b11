"""What two gangs must have in common, and how a difference is described."""

from __future__ import annotations

from tensorweave.workers.transfer.fingerprint import fingerprint_difference


def test_the_first_difference_is_named() -> None:
    assert fingerprint_difference({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) is None
    assert fingerprint_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == (
        "b: '2' at the sender, '3' at the receiver"
    )
    assert fingerprint_difference({"a": "1"}, {"a": "1", "c": "3"}) == "c: None at the sender, '3' at the receiver"
