"""What drafts gain and cost: the same requests with and without `speculative_config`, in turns, in one process.

    python benchmarks/speculation.py MODEL [--rows copy_b1 wrong_b64 …] [--rounds 5] [--num-threads 1]

Rows: `copy` repeats and edits texts of its prompt, `chat` answers at temperature 1, both drafted by n-grams; in
`wrong` every draft is wrong and in `right` every draft is right, by a drafter that knows the answers. `_b16` is a batch
of 16. Prints per row the medians of output tokens per second, of their ratios, and of the ratios of processor time per
token, which others on the machine disturb less; and tokens per step of a request. Checks that all tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from tensorweave import LLM, KvCacheConfig, NGramDecodingConfig, SamplingParams, UserProvidedDecodingConfig

BATCH_SIZES = {"copy": (1, 4), "chat": (1, 16, 64), "wrong": (1, 16, 64), "right": (1, 16, 64)}
TEXTS = [
    "The harbour master keeps a ledger of every ship that enters the bay. In the first column he writes the name of "
    "the ship, in the second the port from which it comes, and in the third the hour at which it dropped anchor. On "
    "Sunday evening he adds up the fees and sends the total to the town council, which pays for the lighthouse.",
    'def total_price(items, tax_rate):\n    total = 0\n    for item in items:\n        price = item["price"]\n        '
    'quantity = item["quantity"]\n        total += price * quantity\n    return total * (1 + tax_rate)\n\n\ndef '
    'average_price(items):\n    total = 0\n    for item in items:\n        total += item["price"]\n    return total / '
    "len(items)\n",
    '[{"name": "Ada Lovelace", "born": 1815, "city": "London"}, {"name": "Emmy Noether", "born": 1882, "city": '
    '"Erlangen"}, {"name": "Sofia Kovalevskaya", "born": 1850, "city": "Moscow"}, {"name": "Mary Somerville", "born": '
    '1780, "city": "Jedburgh"}]',
    "To make the bread, mix five hundred grams of flour with ten grams of salt and seven grams of dry yeast. Add "
    "three hundred millilitres of warm water and knead the dough for ten minutes. Let it rest for one hour, shape a "
    "loaf, let it rest for another thirty minutes and bake it at two hundred degrees for thirty-five minutes.",
]
TASK = "Repeat the following text exactly, word for word, without any comment:\n\n"
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Tell me a story about a lighthouse keeper.",
    "How do plants grow?",
    "Explain what a compiler does.",
    "Give me ideas for a birthday party.",
    "Why is the sky blue?",
    "Describe a market on a summer morning.",
]


class KnowingDrafter:
    """Drafts what the recorded answers say, shifted by `shift` token ids. Answers are found by their prompts."""

    def __init__(self) -> None:
        self.shift = 0
        self.answers: dict[tuple[int, ...], Sequence[int]] = {}

    def prepare_draft_tokens(self, scheduled_requests: Any) -> None:
        for request in scheduled_requests.generation_requests:
            answer = self.answers.get(tuple(request.tokens[: request.prompt_len]), ())
            at = len(request.tokens) - request.prompt_len
            request.py_draft_tokens = [token + self.shift for token in answer[at : at + request.max_draft_len]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--rows", nargs="+", default=[f"{kind}_b{n}" for kind, sizes in BATCH_SIZES.items() for n in sizes]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-draft-len", type=int, default=8)
    parser.add_argument("--ngram-size", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args()
    drafter = KnowingDrafter()
    ngram = NGramDecodingConfig(max_draft_len=args.max_draft_len, max_matching_ngram_size=args.ngram_size)
    user = UserProvidedDecodingConfig(max_draft_len=args.max_draft_len, drafter=drafter)
    knobs = {
        "kv_cache_config": KvCacheConfig(max_tokens=32768, enable_block_reuse=False),
        "num_threads": args.num_threads,
    }
    with (
        LLM(args.model, **knobs) as plain,
        LLM(args.model, speculative_config=ngram, **knobs) as by_ngrams,
        LLM(args.model, speculative_config=user, **knobs) as by_answers,
    ):
        for row in args.rows:
            kind, _, size = row.partition("_b")
            drafted = by_ngrams if kind in ("copy", "chat") else by_answers
            drafter.shift = int(kind == "wrong")
            print(
                row,
                json.dumps(compare(kind, int(size), plain, drafted, drafter, args.rounds, args.max_tokens)),
                flush=True,
            )


def compare(
    kind: str, size: int, plain: LLM, drafted: LLM, drafter: KnowingDrafter, rounds: int, max_tokens: int
) -> dict[str, Any]:
    prompts = _prompts(kind, size, plain)
    temperature = 0.0 if kind == "copy" else 1.0
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=i, ignore_eos=kind != "copy")
        for i in range(size)
    ]
    rates: dict[str, list[float]] = {"plain": [], "drafted": []}
    processor: dict[str, list[float]] = {"plain": [], "drafted": []}
    steps = tokens = 0
    for index in range(rounds + 1):
        told = {}
        for name, llm in (("plain", plain), ("drafted", drafted)):
            began_s, processor_s = time.perf_counter(), time.process_time()
            outputs: Any = llm.generate(prompts, params, use_tqdm=False)
            elapsed_s, processor_s = time.perf_counter() - began_s, time.process_time() - processor_s
            told[name] = [list(output.outputs[0].token_ids) for output in outputs]
            if index:  # the first round warms up
                rates[name].append(sum(map(len, told[name])) / elapsed_s)
                processor[name].append(sum(map(len, told[name])) / processor_s)
            if name == "plain":
                drafter.answers = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in outputs}
        rows = [row["inflightBatchingStats"] for row in drafted.get_stats()]
        steps, tokens = sum(row["numGenRequests"] for row in rows), sum(map(len, told["drafted"])) - size
        plain.get_stats()
        assert told["plain"] == told["drafted"], "drafts have changed tokens"
    ratios, of_processor = (
        [b / a for a, b in zip(measured["plain"], measured["drafted"], strict=True)] for measured in (rates, processor)
    )
    return {
        "plain_tok_s": round(statistics.median(rates["plain"]), 1),
        "drafted_tok_s": round(statistics.median(rates["drafted"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "processor_ratio": round(statistics.median(of_processor), 3),
        "processor_ratios": [round(ratio, 3) for ratio in of_processor],
        "tokens_per_step": round(tokens / steps, 2),
    }


def _prompts(kind: str, size: int, llm: LLM) -> list[list[int]]:
    asked = [TASK + text for text in TEXTS] if kind == "copy" else QUESTIONS
    prompts = []
    for i in range(size):
        question = asked[i % len(asked)] + ("" if i < len(asked) else f" ({i})")
        chat = [{"role": "user", "content": question}]
        text = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(list(llm.tokenizer.encode(text)))
    return prompts


if __name__ == "__main__":
    main()
