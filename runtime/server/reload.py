"""SIGHUP: the spec is read again and takes effect, and no request is dropped.

Limits and tiles change between two steps of the replicas that run. For the rest (other adapters, too) new replicas are
loaded beside the old ones; when they are ready they get the new requests, and the old ones end with the last answer
they owe. Adapters that clients have loaded are loaded there as well. A spec that cannot be had leaves everything as it
is.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ..device import check_gpus
from ..launch import Launch
from ..memory import check_memory
from ..model_shape import BadModel, ModelShape
from ..runnable import check_runnable, fields_that_need_new_replicas
from ..safe_yaml import BadYaml
from ..spec import BadSpec, Deployment, load_deployment
from .app import Service
from .replicas import ReplicaProcesses

_POLL_S = 0.05


class Reloader:
    """Brings a running service to what its spec file says now; one reload at a time."""

    def __init__(
        self,
        spec_file: Path,
        shape: ModelShape,
        service: Service,
        processes: ReplicaProcesses,
        start: Callable[[Deployment], ReplicaProcesses],
        say: Callable[[str], None],
    ) -> None:
        """processes: the replicas that run; start: begins to load those of a deployment; say: tells people."""
        self._spec_file = spec_file
        self._shape = shape
        self._service = service
        self._processes = processes
        self._running = processes.deployment
        self._start = start
        self._say = say
        self._wanted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading = False

    def request(self) -> None:
        """Reload soon; asked again meanwhile, once more after that."""
        self._wanted = True
        if not self._reloading:
            self._reloading = True
            self._go_on(self._reload_while_wanted())

    def cancel(self) -> None:
        """The server ends."""
        for task in self._tasks:
            task.cancel()

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_while_wanted(self) -> None:
        try:
            while self._wanted:
                self._wanted = False
                await self._reload_and_tell()
        finally:
            self._reloading = False

    async def _reload_and_tell(self) -> None:
        while not self._service.fleet.ready:
            await asyncio.sleep(_POLL_S)
        try:
            result, text = await self._reload()
        except (BadSpec, BadYaml, BadModel, OSError) as error:
            result, text = "refused", f"the spec stays as it is: {error}"
        self._service.metrics.reloaded(result)
        self._say(f"reload {result}: {text}")

    async def _reload(self) -> tuple[str, str]:
        """(result, what it means). Raises: BadSpec, BadYaml, BadModel, OSError, and nothing changed."""
        deployment = load_deployment(self._spec_file)
        if deployment.model != self._running.model:
            todo = "start another server for another model"
            raise BadSpec("model", deployment.model, f"{self._running.model}, which clients know this server by", todo)
        check_runnable(deployment, self._shape)
        self._check_adapters(deployment)
        changes = _changes(self._running, deployment)
        if not changes:
            return "unchanged", f"{self._spec_file} says what runs"
        built = self._processes.deployment
        reasons = _changes_beside_pools(built, deployment)
        reasons += fields_that_need_new_replicas(built.pool, deployment.pool)
        if not reasons:
            reasons = await self._change(deployment)
        if reasons and Launch.from_environment() is not None:
            todo = "start the ranks again with this spec"
            raise BadSpec(reasons[0], "needs new ranks", "what changes while ranks started from outside run", todo)
        if reasons:
            await self._replace(deployment)
        self._running = deployment
        return "replaced" if reasons else "changed", ", ".join(changes)

    def _check_adapters(self, deployment: Deployment) -> None:
        name, adapters = self._service.model.name, self._service.adapters
        if name in (adapter.name for adapter in deployment.adapters):
            raise BadSpec("adapters", name, "names other than the model's for clients", "choose another name")
        if adapters.may_change and deployment.pool.max_loras == 0:
            raise BadSpec("pools.0.max_loras", 0, "at least 1: this server was started with a folder for adapters")

    async def _change(self, deployment: Deployment) -> list[str]:
        """Let the replicas go on with other limits and tiles; returns why they do not."""
        fleet = self._service.fleet
        answers = [await replica.change(deployment.pool) for replica in fleet.replicas]
        refusals = [answer for answer in answers if answer is not None]
        if not refusals:
            fleet.pool = deployment.pool
        return refusals

    async def _replace(self, deployment: Deployment) -> None:
        """Load new replicas, send new requests to them, and let the old ones end with their last answer."""
        check_gpus(deployment.pool, replicas=deployment.pool.replicas)
        check_memory(self._shape, deployment.pool)
        processes = self._start(deployment)
        try:
            await processes.connect()
            while not all(replica.ready for replica in processes.replicas):
                for replica in processes.replicas:
                    if replica.lost:
                        reason = replica.failure[1] if replica.failure else processes.exit_text(replica.index)
                        raise BadSpec("the new replicas", reason, "replicas that load", "correct the spec")
                await asyncio.sleep(_POLL_S)
            async with self._service.adapters.moved(processes.replicas, deployment.adapters):
                self._service.fleet.replace(processes.replicas, deployment.pool)
        except BaseException:
            processes.close()
            raise
        service, pool = self._service, deployment.pool
        by_priority = pool.scheduling == "priority"
        service.model = dataclasses.replace(service.model, max_model_len=pool.max_model_len, by_priority=by_priority)
        self._go_on(self._retire(self._processes))
        self._processes = processes

    async def _retire(self, processes: ReplicaProcesses) -> None:
        while any(replica.live for replica in processes.replicas):
            await asyncio.sleep(_POLL_S)
        processes.close()
        await asyncio.to_thread(processes.stop)
        for replica in processes.replicas:
            self._service.fleet.forget(replica)


def _changes(before: Deployment, after: Deployment) -> list[str]:
    """The fields of what runs that differ: those of the deployment, and those of its only pool."""
    old, new = before.signature(), after.signature()
    pool = [name for name in new["pools"][0] if old["pools"][0][name] != new["pools"][0][name]]
    return _changes_beside_pools(before, after) + pool


def _changes_beside_pools(before: Deployment, after: Deployment) -> list[str]:
    old, new = before.signature(), after.signature()
    return [name for name in new if name != "pools" and old[name] != new[name]]
