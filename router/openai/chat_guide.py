"""`GuideWriter`: the guide of a chat's answer: of its reasoning, its calls of tools, and the form of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.guided.guide import guide_for
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
            guide = self._of_answer(request, prompt, answer_guide)
        except RequestRejected as error:
            if not (use.is_legacy and error.param is not None and error.param.startswith("tools")):
                raise
            raise RequestRejected(error.message, param="functions") from None
        if guide is not None and guide is not answer_guide:
            self._check(request, budget)
        return guide

    def _of_answer(
        self, request: ChatCompletionRequest, prompt: Sequence[int], answer_guide: Guide | None
    ) -> Guide | None:
        """Reasoning and calls are a structural tag, which only xgrammar reads: where llguidance would enforce the form
        of the answer, xgrammar's guide of it is a part of the tag, if there is one."""
        try:
            return self._of_whole(request, prompt, answer_guide)
        except RequestRejected:
            asked = request.guide_params
            if asked is None or answer_guide is None or answer_guide.backend == "xgrammar":
                raise
        params, param = asked
        try:
            in_tag = guide_for(params, "xgrammar", self.limits, param=param, may_be_grammar=True)
        except RequestRejected as error:
            raise RequestRejected(f"{error.message}, which reasoning and calls of tools need", param=param) from None
        return self._of_whole(request, prompt, in_tag)

    def _of_whole(
        self, request: ChatCompletionRequest, prompt: Sequence[int], answer_guide: Guide | None
    ) -> Guide | None:
        use = request.tool_use
        return self.form.guide(
            use.functions(),
            use.choice,
            is_parallel=use.is_parallel,
            prompt_tail=prompt_tail(request, prompt, self.tokenizer),
            answer_guide=answer_guide,
            max_thinking_tokens=request.thinking_token_budget,
            limits=self.limits,
        )

    def _check(self, request: ChatCompletionRequest, budget: int | None) -> None:
        """That the service and the request's other fields allow a structural tag."""
        param = "tools" if request.tool_use.tools else "thinking_token_budget" if budget else "response_format"
        if self.backend not in ("auto", "xgrammar"):
            raise RequestRejected(
                f"{param}: this needs the backend xgrammar, and the service has {self.backend or 'none'} "
                "(guided_decoding_backend)",
                param=param,
            )
        request.check_may_end(param)
