"""`GuideWriter`: the guide of a chat's answer: of its reasoning, its calls of tools, and the form of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.openai.chat_form import prompt_tail
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.text.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class GuideWriter:
    """Attributes:
    form: The format of the model's answers.
    tokenizer: The model's.
    backend: What the service has for guides; None: it has none.
    limits: Bounds of a function's schema.
    """

    form: ChatFormat
    tokenizer: Tokenizer
    backend: BackendChoice | None
    limits: GuidedLimits

    def write(self, request: ChatCompletionRequest, prompt: Sequence[int], answer_guide: Guide | None) -> Guide | None:
        """The guide of the whole answer; None: it is free. `answer_guide`: that of its text alone.

        Raises:
            RequestRejected: The service cannot enforce what the request asks for.
        """
        use, budget = request.tool_use, request.thinking_token_budget
        if not use.tools and answer_guide is None and budget is None:
            return None
        if budget is not None and not self.form.has_reasoning:
            raise RequestRejected(
                "thinking_token_budget: this model has no known form of reasoning (see reasoning_parser)",
                param="thinking_token_budget",
            )
        try:
            guide = self.form.guide(
                use.functions(),
                use.choice,
                is_parallel=use.is_parallel,
                prompt_tail=prompt_tail(request, prompt, self.tokenizer),
                answer_guide=answer_guide,
                max_thinking_tokens=budget,
                limits=self.limits,
            )
        except RequestRejected as error:
            if not (use.is_legacy and error.param is not None and error.param.startswith("tools")):
                raise
            raise RequestRejected(error.message, param="functions") from None
        if guide is not None and guide is not answer_guide:
            self._check(request, budget)
        return guide

    def _check(self, request: ChatCompletionRequest, budget: int | None) -> None:
        """That the service and the request's other fields allow a structural tag."""
        param = "tools" if request.tool_use.tools else "thinking_token_budget" if budget else "response_format"
        if self.backend not in ("auto", "xgrammar"):
            raise RequestRejected(
                f"{param}: this needs the backend xgrammar, and the service has {self.backend or 'none'} "
                "(guided_decoding_backend)",
                param=param,
            )
        if request.ignore_eos:
            raise RequestRejected(
                f"ignore_eos and {param} exclude each other: a guide says where to end", param="ignore_eos"
            )
