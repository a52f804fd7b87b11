"""From `TorchLlmArgs` to one rank's KV transfers with other gangs. `build_executor` calls it."""

from __future__ import annotations

from pathlib import Path

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.cluster.tls import TlsFiles
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.engine_dir.manifest import saved_quantization
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.report_channel import open_report_channel
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.step.kv_exchange import NoTransfers, Transfers
from tensorweave.workers.step.layer_marks import CudaLayerMarks, LayerMarks, NoLayerMarks
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.store.model_store import resolve_model
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.fingerprint import fingerprint
from tensorweave.workers.transfer.transfers import KvTransfers
from tensorweave.workers.transfer.transports.peer_sockets import PlainPeers, TlsPeers
from tensorweave.workers.transfer.transports.selection import DIRECT_BACKEND, make_transports
from tensorweave.workers.transfer.window import PoolWindow


def make_transfers(
    args: TorchLlmArgs,
    engine: ModelEngine,
    kv_cache: KVCache,
    comm: Comm,
    host: str,
    secret: str,
    tls: TlsFiles | None,
) -> Transfers:
    """Every rank of the gang calls it. `host`, `secret` and `tls` are as `build_executor` takes them."""
    config = args.cache_transceiver_config
    if config is None or config.backend is None:
        return NoTransfers()
    if not secret:
        raise ValueError("cache_transceiver_config is set, but no secret was given for the gang's KV endpoints")
    is_direct = config.backend == DIRECT_BACKEND
    digest, num_heads = _kv_identity(args, resolve_model(args.model, revision=args.revision), engine)
    marks = follow_layers(engine) if is_direct else NoLayerMarks()
    window = PoolWindow(engine.pool, config.max_copy_sms, is_direct=is_direct)
    alike = fingerprint(window, digest, num_heads)
    transports = make_transports(config.backend, window, is_encrypted=tls is not None)
    return KvTransfers(
        carrier=TcpCarrier(window, alike, host, secret, transports, PlainPeers() if tls is None else TlsPeers(tls)),
        window=window,
        kv_cache=kv_cache,
        reports=open_report_channel(comm, host),
        fingerprint=alike,
        rank=comm.rank,
        size=comm.size,
        timeout_s=config.kv_transfer_timeout_ms / 1000,
        lease_s=config.kv_lease_timeout_ms / 1000,
        marks=marks,
    )


def follow_layers(engine: ModelEngine) -> LayerMarks:
    """Marks of the engine's layers, if it tells of them."""
    if not isinstance(engine, DeviceEngine) or engine.pool.cache.device.type != "cuda":
        return NoLayerMarks()
    marks = CudaLayerMarks(len(engine.pool.layers))
    engine.tell_layers(marks)
    return marks


def _kv_identity(args: TorchLlmArgs, path: Path, engine: ModelEngine) -> tuple[str, int]:
    """What gangs that exchange KV compare: a digest of the model, and its number of KV heads over all ranks."""
    digest = model_digest(path, args.load_format)
    quantization = weight_quantization(args.quant_config) or saved_quantization(path, args.load_format)
    if quantization is not None:
        digest = f"{digest} in {quantization}"
    if args.load_format == "dummy":  # a CPU and a GPU draw other weights
        digest = f"{digest} on {engine.pool.cache.device.type}"
    if args.backend == "_autodeploy":
        return f"{digest} by transformers", engine.pool.cache.shape[2] // 2
    config = load_model_config(path)
    if engine.info.max_seq_len > config.default_seq_len:  # keys of the same tokens are rotated by other factors
        digest = f"{digest} with long factors"
    if isinstance(engine, DeviceEngine) and engine.has_own_keys:
        digest = f"{digest} with reordered keys"
    return digest, config.sizes.num_kv_heads
