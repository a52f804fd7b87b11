"""`SamplingParams`, also from where the documents of the LLM API import it."""

from tensorweave.llmapi.sampling_params import SamplingParams

__all__ = ["SamplingParams"]
