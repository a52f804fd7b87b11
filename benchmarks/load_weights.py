"""How long a GPU's weights take: from files, warm and cold, by several settings, and at random.

    python benchmarks/load_weights.py --directory /tmp/llama8b [--readers 4 8 12 16] [--pieces 16 32] [--plain] [--cold]

Writes a checkpoint of Llama-3.1-8B's shape with random weights in bfloat16, 16 GB, if the directory has none.
Cold: the files' pages were dropped from the page cache before (posix_fadvise), so that they are read from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tensorweave.cli.suite_shapes import LLAMA_8B
from tensorweave.cluster.mesh import MeshRank
from tensorweave.workers.models.assembly import count_weights, tensor_shapes
from tensorweave.workers.models.checkpoint import RandomWeights, SafetensorsDirectory
from tensorweave.workers.models.device_loader import DeviceLoader
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.rank_weights import RankWeights, WeightRequest

DEVICE = torch.device("cuda", 0)
SHARD_BYTES = 4 << 30


def write_checkpoint(directory: Path) -> None:
    """Shards of at most 4 GiB, as transformers writes them."""
    shapes = tensor_shapes(load_model_config(directory))
    weights = RandomWeights(shapes, device=DEVICE)
    shards: list[dict[str, Tensor]] = [{}]
    for name in shapes:
        tensor = weights.read(name).bfloat16().cpu()
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file)
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def cached_bytes() -> int:
    """Of the host's page cache."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Cached"].split()[0]) << 10


def drop_pages(directory: Path) -> int:
    """Bytes by which the page cache has become smaller."""
    before = cached_bytes()
    for file in directory.glob("*.safetensors"):
        fileno = os.open(file, os.O_RDONLY)
        os.fsync(fileno)
        os.posix_fadvise(fileno, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fileno)
    return before - cached_bytes()


def ask_all(weights: RankWeights, requests: list[WeightRequest]) -> list[object]:
    return [weights.rows(request.parts) for request in requests]


def timed(load: Callable[[], list[object]]) -> float:
    """With pinned memory allocated anew, as in a new process."""
    torch.cuda.synchronize()
    torch._C._host_emptyCache()
    began_s = time.perf_counter()
    kept = load()
    torch.cuda.synchronize()
    elapsed_s = time.perf_counter() - began_s
    del kept
    torch.cuda.empty_cache()
    return elapsed_s


def time_files(directory: Path, requests: list[WeightRequest], options: argparse.Namespace) -> None:
    num_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))

    def told(name: str, load: Callable[[], list[object]]) -> None:
        elapsed_s = timed(load)
        print(f"{name}: {elapsed_s:.2f} s, {num_bytes / elapsed_s / 1e9:.1f} GB/s", flush=True)

    with SafetensorsDirectory(directory) as source:

        def load(readers: int, piece_mib: int) -> list[object]:
            size = piece_mib << 20
            with DeviceLoader(source.places(), requests, torch.bfloat16, DEVICE, readers, piece_bytes=size) as loader:
                return ask_all(loader, requests)

        for readers in options.readers:
            for piece in options.pieces:
                told(f"{readers} readers, pieces of {piece} MiB, warm", partial(load, readers, piece))
        if options.plain:
            plain = WeightLoader(source, torch.bfloat16, DEVICE)
            told("one thread, mapped files, warm", lambda: ask_all(plain, requests))
        if options.cold:
            print(f"dropped {drop_pages(directory) / 1e9:.1f} of {num_bytes / 1e9:.1f} GB from the page cache")
            told("cold", partial(load, options.readers[-1], options.pieces[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--readers", type=int, nargs="+", default=[8])
    parser.add_argument("--pieces", type=int, nargs="+", default=[16], help="MiB per piece")
    parser.add_argument("--plain", action="store_true", help="also the loader that is used on CPUs")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    config = load_model_config(LLAMA_8B.write(directory, "bfloat16"))
    requests = count_weights(config, MeshRank()).requests
    random = WeightLoader(RandomWeights(tensor_shapes(config), device=DEVICE), torch.bfloat16, DEVICE)
    for attempt in ("first", "again"):
        print(f"random weights, {attempt}: {timed(lambda: ask_all(random, requests)):.2f} s", flush=True)
    if not any(directory.glob("*.safetensors")):
        began_s = time.perf_counter()
        write_checkpoint(directory)
        print(f"wrote the checkpoint in {time.perf_counter() - began_s:.1f} s", flush=True)
    time_files(directory, requests, options)


if __name__ == "__main__":
    main()
