"""A rank with a real executor and group but no model, for tests of gangs: the next token is a hash of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorweave.workers.rank import RankWorker

if TYPE_CHECKING:
    from tensorweave.cluster.llm_args import TorchLlmArgs
    from tensorweave.cluster.ranks import RankOrder
    from tensorweave.workers.executor.executor import PyExecutor
    from tensorweave.workers.gang.comm import Comm


class HashRankWorker(RankWorker):
    """Each step takes at least `step_s`; `package_version` is what it says it is of. The oracle of its tokens is
    `workers.fakes.fake_engine.hash_token`."""

    def __init__(self, step_s: float = 0.0, package_version: str | None = None) -> None:
        super().__init__()
        self._step_s = step_s
        self._package_version = package_version

    async def versions(self) -> list[Any]:
        package, protocol = await super().versions()
        return [self._package_version or package, protocol]

    def _build_executor(self, args: TorchLlmArgs, comm: Comm, order: RankOrder) -> PyExecutor:
        from tensorweave.cluster.step_settings import StepSettings
        from tensorweave.workers.executor.executor import PyExecutor
        from tensorweave.workers.executor.scheduler import SimpleScheduler
        from tensorweave.workers.fakes.fake_engine import PacedEngine
        from tensorweave.workers.kv.manager import KVCacheManager
        from tensorweave.workers.sampling.decoder import SamplingDecoder
        from tensorweave.workers.step.resources import ResourceManager

        if args.model == "refused":
            raise ValueError("model 'refused' is refused")
        if args.model == "crashing" and comm.rank == comm.size - 1:
            raise MemoryError("no memory for the weights")
        engine = PacedEngine(self._step_s)
        info = engine.info
        kv_cache = KVCacheManager(num_blocks=info.num_blocks, tokens_per_block=info.tokens_per_block)
        decoder = SamplingDecoder()
        return PyExecutor(
            engine=engine,
            scheduler=SimpleScheduler(kv_cache),
            resources=ResourceManager([decoder.states, kv_cache]),
            decoder=decoder,
            comm=comm,
            info=info,
            disable_overlap_scheduler=not StepSettings.of(args, "cpu").overlaps,
        )
