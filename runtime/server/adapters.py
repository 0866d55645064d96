"""Adapters by name: what clients may ask for as `model`, and loading and unloading them while the server runs.

The two calls are vLLM's: POST /v1/load_lora_adapter {"lora_name", "lora_path"} and POST /v1/unload_lora_adapter
{"lora_name"}. They are there only where the server was started with a folder for adapters; a path must lie inside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..spec import Adapter, BadSpec
from .protocol import ApiError
from .replicas import Fleet, Replica

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LoadBody(_Body):
    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    # of vLLM's fields, what asks for nothing
    load_inplace: Literal[False] | None = None
    is_3d_lora_weight: Literal[False] | None = None


class UnloadBody(_Body):
    lora_name: _Name


_AnyBody = TypeVar("_AnyBody", LoadBody, UnloadBody)


def _parsed(kind: type[_AnyBody], body: bytes) -> _AnyBody:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(400, f"{field}: {first['msg']}", field) from None


class ServedAdapters:
    """The adapters that every replica has.

    Args:
        base: the model's own name, which no adapter may take.
        adapters: of the deployment; the replicas load them before they are ready.
        folder: in which adapters lie that may be loaded later; None: none may.
    """

    def __init__(self, base: str, adapters: Iterable[Adapter], fleet: Fleet, folder: Path | None) -> None:
        now = int(time.time())
        self._base = base
        self._created: dict[str, int] = {adapter.name: now for adapter in adapters}
        self._later: dict[str, Path] = {}
        self._loading: set[str] = set()
        self._moving = asyncio.Lock()
        self._fleet = fleet
        self._folder = None if folder is None else folder.resolve()

    def __contains__(self, name: str) -> bool:
        return name in self._created

    @property
    def may_change(self) -> bool:
        """Whether adapters may be loaded and unloaded."""
        return self._folder is not None

    def objects(self) -> list[dict[str, Any]]:
        """What GET /v1/models tells of them."""
        return [self.object(name) for name in self._created]

    def object(self, name: str) -> dict[str, Any]:
        """What GET /v1/models tells of one."""
        created = self._created[name]
        return {"id": name, "object": "model", "created": created, "owned_by": "paretune", "parent": self._base}

    async def load(self, body: bytes) -> str:
        """Load what a body names on every replica, or on none. Raises: ApiError."""
        asked = _parsed(LoadBody, body)
        name, path = asked.lora_name, self._inside(asked.lora_path)
        if name == self._base or name in self._created or name in self._loading:
            raise ApiError(400, f"lora_name: {name!r} is taken: unload it first, or choose another name", "lora_name")
        self._loading.add(name)
        try:
            async with self._moving:
                refusal = await self._fleet.load_adapter(name, path)
                if refusal is None:
                    self._created[name], self._later[name] = int(time.time()), path
        finally:
            self._loading.discard(name)
        if refusal is not None:
            raise ApiError(400, refusal, "lora_path")
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: bytes) -> str:
        """Let no more requests name an adapter; those that run end as they would. Raises: ApiError (404)."""
        name = _parsed(UnloadBody, body).lora_name
        if name not in self._created:
            raise ApiError(404, f"there is no adapter {name[:80]!r}", "lora_name", "model_not_found")
        del self._created[name]
        self._later.pop(name, None)
        self._fleet.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    @asynccontextmanager
    async def moved(self, replicas: Sequence[Replica], adapters: Iterable[Adapter]) -> AsyncIterator[None]:
        """Have other replicas ready for all adapters; in the body, which does not wait, they take over.

        Args:
            adapters: of their spec, which they have. One that clients unloaded is there again; of equal names it is the
                spec's that stays.
        Raises: BadSpec: an adapter that clients loaded does not load there.
        """
        of_spec = {adapter.name for adapter in adapters}
        async with self._moving:
            carried = {name: folder for name, folder in self._later.items() if name not in of_spec}
            for name, folder in carried.items():
                refusals = await asyncio.gather(*(replica.load_adapter(name, folder) for replica in replicas))
                for refusal in filter(None, refusals):
                    raise BadSpec(f"the adapter {name!r}", refusal, "one that new replicas load", "unload it")
            yield
            # unloaded meanwhile
            for name in carried.keys() - self._later.keys():
                for replica in replicas:
                    replica.unload_adapter(name)
            now = int(time.time())
            self._later = {name: folder for name, folder in self._later.items() if name in carried}
            self._created = {name: self._created.get(name, now) for name in (*sorted(of_spec), *self._later)}

    def _inside(self, path: str) -> Path:
        assert self._folder is not None, "the routes are there only with a folder"
        try:
            found = (self._folder / path).resolve()
        except (OSError, ValueError):  # a loop of links; a NUL
            found = Path("/")
        if not found.is_relative_to(self._folder) or not found.is_dir():
            raise ApiError(400, "lora_path: no folder inside the one for adapters", "lora_path")
        return found
