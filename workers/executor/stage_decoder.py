"""How pipeline stages come to the same tokens: the last one decodes and sends its results, the others receive them."""

from __future__ import annotations

from tensorweave.workers.gang.stages import StageLink
from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.step.pending import Later, Pending, Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.result import StepResult
from tensorweave.workers.step.result_wire import pack_result, unpack_result


class LastStageDecoder(Decoder):
    """Decodes by `decoder` where the logits are computed, and sends each result to the other stages."""

    def __init__(self, decoder: Decoder, stages: StageLink) -> None:
        self.processors = decoder.processors
        self._decoder = decoder
        self._stages = stages

    def reads_tokens(self, request: LlmRequest) -> bool:
        """All tokens of a request are known when its next one is planned."""
        return False

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        return logits.then(lambda step: self._decode(step, batch))

    def _decode(self, step: StepLogits, batch: ScheduledBatch) -> StepResult:
        result = self._decoder.launch(Ready(step), batch).result()
        self._stages.send_result(pack_result(result))
        return result


class OtherStageDecoder(Decoder):
    """Receives the results of the last stage, in the order in which steps settle. `decoder` keeps users' processors,
    which the last stage runs."""

    def __init__(self, decoder: Decoder, stages: StageLink) -> None:
        self.processors = decoder.processors
        self._stages = stages

    def reads_tokens(self, request: LlmRequest) -> bool:
        return False

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        return Later(lambda: self._receive(logits, batch))

    def _receive(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> StepResult:
        logits.result()  # this stage's own errors, which come before any result
        return unpack_result(self._stages.receive_result(), batch)


def stage_decoder(decoder: Decoder, stages: StageLink, *, is_last: bool) -> Decoder:
    return LastStageDecoder(decoder, stages) if is_last else OtherStageDecoder(decoder, stages)
