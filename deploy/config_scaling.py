"""The table of a service's configuration that says when its pools change while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from tensorweave.cluster.llm_args import LlmArgs
from tensorweave.cluster.strict_model import Field, StrictBaseModel
from tensorweave.deploy.config_tables import PoolConfig


class ScalingConfig(StrictBaseModel):
    """When pools grow and shrink between `min_replicas` and `max_replicas`, and when gangs move between prefill and
    decode. A pool's pressure is the largest of what is measured there, each divided by its target."""

    target_ttft_s: float = Field(
        2.0, status="prototype", gt=0, description="Time to first token, 90th percentile, that prefill is to keep."
    )
    target_itl_s: float = Field(
        0.1, status="prototype", gt=0, description="Time between tokens, 90th percentile, that decode is to keep."
    )
    target_waiting: float = Field(
        4.0, status="prototype", gt=0, description="Sequences that may wait per gang that computes prompts."
    )
    moves: bool = Field(
        False,
        status="prototype",
        description="Move gangs between prefill and decode if one of them is above its targets and the other would "
        "stay below them with a gang less. Needs pools that differ in nothing but their role.",
    )
    interval_s: float = Field(5.0, status="prototype", gt=0, description="Time between two decisions.")
    window_s: float = Field(30.0, status="prototype", gt=0, description="The time that measurements cover.")
    hold_s: float = Field(
        30.0,
        status="prototype",
        ge=0,
        description="How long a pressure above 1 lasts before a pool grows or gets a gang.",
    )
    shrink_hold_s: float = Field(
        300.0, status="prototype", ge=0, description="How long a pool could do with a gang less before it shrinks."
    )
    slack: float = Field(
        0.7,
        status="prototype",
        gt=0,
        lt=1,
        description="A pool can do with a gang less if its pressure, shared by the others, would be at most this.",
    )
    pause_s: float = Field(
        60.0, status="prototype", ge=0, description="Time after a change before the next, in which its effect shows."
    )


def obstacle_to_moves(pools: Mapping[str, PoolConfig]) -> str | None:
    """Why no gang can change its role, in which alone pools may differ for that; None if one can."""
    by_role = {pool.role: pool for pool in pools.values()}
    if not {"prefill", "decode"} <= by_role.keys():
        return "needs a pool of role 'prefill' and one of role 'decode'"
    keys = [*LlmArgs.model_fields, "gpus_per_rank", "placement"]
    different = [key for key in keys if getattr(by_role["prefill"], key) != getattr(by_role["decode"], key)]
    return f"the pools of roles 'prefill' and 'decode' differ in {', '.join(sorted(different))}" if different else None
