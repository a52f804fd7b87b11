"""Tokenizers built on the spot: byte-level BPE like SmolLM2's, byte fallback like Llama 2's, Metaspace, WordPiece."""

from __future__ import annotations

import functools

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from tensorweave.router.text.tokens import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The capital of France is Paris. It lies on the Seine.",
    "Grüße aus Köln, où l'été est chaud — naïve façade.",
    "東京は日本の首都です。你好,世界!",
    "def add(a, b):\n    return a + b\n",
    "😀 👩‍👩‍👧 🇫🇷 emoji, and 1234567890 numbers.",
] * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content.strip() }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Reasoning and tools as in Hermes' and Qwen3's templates."""


@functools.cache
def byte_level() -> Tokenizer:
    return byte_level_with(CHAT_TEMPLATE)


@functools.cache
def hermes() -> Tokenizer:
    return byte_level_with(HERMES_TEMPLATE)


@functools.cache
def hermes_with_special_marks() -> Tokenizer:
    """The marks of its format are special tokens, as Mistral's and DeepSeek's are, and there is another one."""
    tokenizer = byte_level_with(HERMES_TEMPLATE)
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<other>"]
    tokenizer.backend.add_special_tokens({"additional_special_tokens": marks})
    return Tokenizer(tokenizer.backend)


def byte_level_with(chat_template: str) -> Tokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    rust.add_tokens(["<tool>", "naïve☃"])
    backend = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    backend.chat_template = chat_template
    return Tokenizer(backend)


def _byte_fallback() -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for piece in ["▁", "▁the", "▁cap", "ital", "a", "b", "c", "é", "日", "本", "▁▁", "x▁y", "."]:
        vocab[piece] = len(vocab)
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    rust.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def byte_fallback() -> Tokenizer:
    return Tokenizer(_byte_fallback())


@functools.cache
def llama2() -> Tokenizer:
    """Puts <s> before a text, as Llama 2's does, and has a special token that ends a chat's prompt."""
    backend = _byte_fallback()
    rust = backend.backend_tokenizer
    rust.add_special_tokens(["<|assistant|>"])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.chat_template = "<s>{% for message in messages %}{{ message['content'] }}{% endfor %}<|assistant|>"
    return Tokenizer(backend)


@functools.cache
def slow_llama2() -> Tokenizer:
    """The same, known only by its decode."""
    return Tokenizer(llama2().backend, uses_rust=False)


@functools.cache
def slow_byte_level() -> Tokenizer:
    return Tokenizer(byte_level().backend, uses_rust=False)


@functools.cache
def word_piece() -> Tokenizer:
    """Lower-cases, and puts special tokens on both sides, as BERT's does."""
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    pieces = [*specials, "the", "cap", "##ital", "##s", "of", "france", ".", "a", "##a", "b", "##b"]
    rust = RustTokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    rust.add_special_tokens(specials)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]", sep_token="[SEP]"))


@functools.cache
def metaspace() -> Tokenizer:
    vocab = [("<unk>", 0.0), ("</s>", 0.0)]
    vocab += [
        (piece, -float(i + 1)) for i, piece in enumerate(["▁", "▁the", "▁cap", "ital", "a", "b", "日", ".", "▁Paris"])
    ]
    rust = RustTokenizer(models.Unigram(vocab, unk_id=0))
    rust.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", unk_token="<unk>"))
