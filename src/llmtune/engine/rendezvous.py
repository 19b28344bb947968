"""Where the processes of a training meet: a key-value store, and who of them shares a machine, cores or a GPU."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from llmtune.common.decisions import Decision
from llmtune.common.environment import available_cores, environment_error, launcher_number
from llmtune.errors import MachineError, RankLostError

__all__ = [
    "ALONE",
    "Neighbours",
    "allow_long_waits",
    "arrive",
    "count_neighbours",
    "divide_cores",
    "make_group",
    "open_store",
    "refuse_shared_gpus",
]

_kept: dict[str, Store] = {}
"""The store that this process keeps for the others, by its port. It lives as long as the process: another may come to
the next meeting before this one has left the last, and must not find a store that is about to end."""


def open_store(rank: int, world_size: int, timeout: dt.timedelta, environ: Mapping[str, str]) -> Store:
    """Open the store of this meeting alone, in which no earlier training of these processes has left anything.

    It is that of the process group that the program around this one has made (Ray Train), else a launcher's or the main
    process's own. `timeout`: how long a process looks for it, and waits for a key. Raises MachineError where it is not
    said where to meet, RankLostError where the launcher has ended.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise environment_error(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set", "start with `torchrun`"
        )
    address, port = environ["MASTER_ADDR"], launcher_number("MASTER_PORT", 1, environ, most=65535)
    assert port is not None, "it is set"
    if dist.is_initialized():
        return _of_this_meeting(_get_default_store(), rank, environ)
    is_in_launcher = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_in_launcher:
        _check_launcher(address, port, timeout.total_seconds())
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    if rank == 0 and not is_in_launcher:
        _kept[environ["MASTER_PORT"]] = store
    store = _of_this_meeting(store, rank, environ)
    if is_in_launcher:
        store = _store_of_main(store, rank, address, timeout)
    store.set_timeout(timeout)
    return store


LONGEST_WAITS = 10
"""Time-outs after which a collective operation ends even where every process answers: they wait for each other, or one
is in code of the user's that never ends."""


def make_group(store: Store, rank: int, world_size: int, device: torch.device, timeout: dt.timedelta) -> None:
    """Make torch's process group: nccl on GPUs, gloo on CPUs. `timeout`: for its processes to reach each other."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    allow_long_waits(dist.group.WORLD, timeout)


def allow_long_waits(group: dist.ProcessGroup | None, timeout: dt.timedelta) -> None:
    """Let the group's operations take longer than the `timeout` in which its processes had to reach each other."""
    distributed_c10d._set_pg_timeout(LONGEST_WAITS * timeout, group)  # torch has no other way


def _of_this_meeting(store: Store, rank: int, environ: Mapping[str, str]) -> Store:
    """The part of a store, which may outlive a training and its processes, that belongs to this meeting.

    Each process counts its own meetings in the store itself, and all of them meet equally often.
    """
    # The store of a launcher outlives the processes that it starts again, with the addresses of the dead.
    store = PrefixStore(f"llmtune/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return PrefixStore(str(store.add(f"meetings/{rank}", 1)), store)


def _check_launcher(address: str, port: int, timeout_s: float) -> None:
    """Raise RankLostError where nobody listens at the store of the (first machine's) launcher.

    It listened before it started any process. Torch would try again until `timeout_s`.
    """
    try:
        socket.create_connection((address, port), min(timeout_s, LONGEST_LOOK_S)).close()
    except ConnectionRefusedError as error:
        problem = f"nobody listens at {address}:{port}: the launcher has ended, or a firewall refuses"
        raise RankLostError(problem, where="distributed", fix="start the run again") from error
    except OSError:  # a name that is not found yet, or a slow network: torch tries again, and has its own message
        return


LONGEST_LOOK_S = 10.0
"""A launcher that has died is refused at once; a longer wait is torch's."""


def _store_of_main(launcher: Store, rank: int, address: str, timeout: dt.timedelta) -> Store:
    """Open the store in the main process that the others find by the launcher's, which may end before they have saved.

    `timeout`: how long they look for it.
    """
    name = "port of the main process"
    port = 0 if rank == 0 else int(launcher.get(name))  # any free one, which the others are told
    store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    if rank == 0:
        launcher.set(name, str(store.port))
    return store  # type: ignore[no-any-return]


class Place(NamedTuple):
    """Where a process computes; a GPU by its number, None on a CPU."""

    host: str
    cores: str
    gpu: str | None


class Neighbours(NamedTuple):
    """How many processes of the training, this one with them, share something with it."""

    machine: int = 1
    cores: int = 1
    """Those that may run on exactly the same cores."""


ALONE = Neighbours()
"""Of a single process."""


def arrive(store: Store, rank: int, world_size: int, device: torch.device, timeout: dt.timedelta) -> list[Place]:
    """Say where this process computes, and give the places of all, by rank, when all have come, within `timeout`."""
    # A scheduler may have bound each process to cores of its own.
    cores = str(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "all"
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    store.set(f"here/{rank}", json.dumps(Place(socket.gethostname(), cores, gpu)))
    # Here and not in the process group: nccl would wait for nobody, and gloo for as long as a sum may take.
    keys = [f"here/{other}" for other in range(world_size)]
    store.wait(keys, timeout)
    return [Place(*json.loads(store.get(key))) for key in keys]


def count_neighbours(places: Sequence[Place], rank: int) -> Neighbours:
    """Count the processes that share the machine, and those that share the cores, of process `rank`."""
    own = places[rank]
    return Neighbours(sum(place.host == own.host for place in places), sum(place[:2] == own[:2] for place in places))


def divide_cores(processes: int) -> list[Decision]:
    """Compute with a share of the cores that so many processes run on, unless OMP_NUM_THREADS says with how many.

    `torchrun` and `--devices` set that; other launchers do not, and the threads of each process would fill all cores.
    """
    cores = available_cores()
    threads = max(1, cores // processes)
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() <= threads:
        return []
    torch.set_num_threads(threads)
    reason = f"{processes} processes run on the same {cores} cores, and OMP_NUM_THREADS is not set"
    return [Decision("process.num_threads", str(threads), reason)]


def refuse_shared_gpus(places: Sequence[Place], rank: int) -> None:
    """Raise MachineError in every process where two have the same GPU; nccl refuses it too, later and less clearly."""
    counts = Counter((place.host, place.gpu) for place in places)
    crowded = [(host, count) for (host, gpu), count in counts.items() if gpu is not None and count > 1]
    if crowded:
        host, count = crowded[0]
        error = MachineError(
            f"{count} processes of {host} have the same GPU",
            where="distributed",
            fix="start one process for each GPU; its launcher sets LOCAL_RANK, or shows it that GPU alone",
        )
        error.is_reported = rank != 0
        raise error
