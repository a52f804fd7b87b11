"""Keywords in random combinations: what is accepted is enforced, by the backend that the table names."""

from __future__ import annotations

import collections
import json
from typing import Any, get_args

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide
from tensorweave.router.guided.document import read_document
from tensorweave.router.guided.ebnf import write_grammar
from tensorweave.router.guided.guide import choose_form, guide_for, read_settled
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.params import GuideParams
from tensorweave.router.guided.refusal import Refusal
from tests.router.guided.matchers import accepts, answers, begin, compact, validator
from tests.router.guided.schema_maker import SchemaMaker

NUM_SCHEMAS = 600
NUM_SEEDS = 4


def check_answers(schema: Any, guide: Guide, num_seeds: int) -> int:
    """Return how many answers came to their end."""
    check, num_done = validator(schema), 0
    for answer in answers(guide, range(num_seeds), max_tokens=250):
        assert check.is_valid(json.loads(answer)), f"{schema} as {guide} gave {answer!r}"
        num_done += 1
    return num_done


def test_every_answer_of_our_grammars_validates() -> None:
    """As xgrammar alone enforces it, in a schema or in a grammar of ours."""
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_SCHEMAS):
        schema = SchemaMaker(seed).schema()
        try:
            guide = guide_for(GuideParams(json=schema), "xgrammar", may_be_grammar=True)
        except RequestRejected:
            continue
        if guide.kind == "json_schema":
            if (grammar := our_grammar(schema)) is None:
                continue
            guide = grammar
        else:
            kinds["needs a grammar"] += 1
        kinds["answers"] += check_answers(schema, guide, 2)
    assert kinds["needs a grammar"] > 10
    assert kinds["answers"] > NUM_SCHEMAS * 0.5


def our_grammar(schema: Any) -> Guide | None:
    limits = GuidedLimits()
    document = read_document(schema, limits)
    settled = read_settled(document, limits)
    try:
        choose_form(document, settled, ("grammar",))
    except Refusal:
        return None
    return Guide("ebnf", write_grammar(settled, 2))


def test_every_answer_validates() -> None:
    """llguidance alone notices that nothing matches two expressions, or that a pattern of names meets a recursion."""
    count: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_SCHEMAS):
        schema = SchemaMaker(seed).schema()
        try:
            guide = guide_for(GuideParams(json=schema))
        except RequestRejected:
            count["refused"] += 1
            continue
        try:
            count["answers"] += check_answers(schema, guide, NUM_SEEDS)
        except ValueError as error:
            assert "Unsatisfiable" in str(error) or "circular references" in str(error), f"{schema} as {guide}"  # noqa: PT017
            count["empty"] += 1
        count[guide.backend] += 1
    assert count["refused"] < NUM_SCHEMAS * 0.3
    assert count["empty"] < NUM_SCHEMAS * 0.02
    assert count["answers"] > NUM_SCHEMAS * NUM_SEEDS * 0.6
    assert min(count["xgrammar"], count["llguidance"]) > NUM_SCHEMAS * 0.1


def test_what_one_backend_writes_the_others_accept() -> None:
    """Written compactly. llguidance leaves out DEL, and lone surrogates are no text."""
    num_compared = 0
    for seed in range(250):
        schema = SchemaMaker(seed).schema()
        guides = [guide for backend in get_args(BackendChoice) if (guide := guide_or_none(schema, backend)) is not None]
        for guide in guides:
            for answer in answers(guide, range(2), max_tokens=200):
                text = compact(json.loads(answer.decode(errors="replace").replace("\x7f", "")))
                assert all(accepts(other, text) for other in guides), f"{text} of {guide}"
                num_compared += len(guides) - 1
    assert num_compared > 1000


def guide_or_none(schema: Any, backend: BackendChoice) -> Guide | None:
    """None: the backend does not enforce it, or finds that nothing is valid."""
    try:
        guide = guide_for(GuideParams(json=schema), backend, may_be_grammar=True)
        begin(guide)
    except ValueError:
        return None
    return guide
