"""`RouterService`: everything that the HTTP app uses, built by the deploy room or by a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.link import GangLink
from tensorweave.cluster.protocol import Adapter, ModelInfo, Role
from tensorweave.router.bodies.pool import BodyPool
from tensorweave.router.bodies.served import ServedModel, check_name
from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.http.body_memory import BodyMemory
from tensorweave.router.http.request_record import Recorder
from tensorweave.router.openai.chat_form import chat_format
from tensorweave.router.text.event_pace import EventPace
from tensorweave.router.text.tokens import Tokenizer


@dataclass(slots=True)
class RouterService:
    """One model's service. Its `info` is read from the gangs once, since it does not change.

    Raises ValueError for a parser's name that is unknown.

    Attributes:
        model_name: The model's name in answers.
        accepts_phases: Clients may send a request's two phases themselves, with tickets that name hosts to connect to.
        key_digests: Digests of the API keys, one of which a client must have (`router/http/keys.py`); none: no key is
            required.
        other_names: Other names by which clients may request the model.
        chat: What the configuration says about chats.
        guided: Bounds of schemas, expressions and grammars.
        roles: Of its pools.
        cors_origins: Origins of web pages whose scripts may call the service (`router/http/middleware.py`); "*": any.
        recorders: Told of each request that has ended: the request log, traces.
        pace: How many deltas of answers it makes in a second.
    """

    model_name: str
    tokenizer: Tokenizer
    dispatcher: Dispatcher
    fleet: Fleet
    version: str
    limits: Limits = field(default_factory=Limits)
    created_s: int = 0
    accepts_phases: bool = False
    key_digests: Sequence[str] = ()
    other_names: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    chat: ChatSettings = field(default_factory=ChatSettings)
    guided: GuidedLimits = field(default_factory=GuidedLimits)
    roles: frozenset[Role] = frozenset[Role]({"both"})
    recorders: Sequence[Recorder] = ()
    pace: EventPace = field(default_factory=EventPace)
    _info: ModelInfo | None = None
    bodies: BodyPool = field(init=False)
    body_memory: BodyMemory = field(init=False)
    chat_format: ChatFormat = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = BodyPool(self.tokenizer, reads_inline=not self.chat.accepts_templates)
        self.chat_format = chat_format(self.tokenizer, self.chat)
        self.body_memory = BodyMemory(self.limits.max_held_body_bytes)

    async def served(self) -> ServedModel:
        """What request bodies are checked against. Raises NotReady if no gang is there in time, RequestRejected if the
        service has no pool that generates."""
        if self.roles == {"embed"}:
            raise RequestRejected("this service has pools of role 'embed' only: it answers /v1/embeddings")
        names = [*self.names, *self.fleet.adapters]
        return ServedModel(names, await self.info(), self.limits.max_sequences, self.chat, self.guided)

    async def served_for_embeddings(self) -> ServedModel:
        """The same for /v1/embeddings."""
        if "embed" not in self.roles:
            raise RequestRejected("this service gives no embeddings: it has no pool of role 'embed'")
        if not self.fleet.links("embed"):
            await self.fleet.wait_link(self.limits.ready_timeout_s, "embed")
        info = self.fleet.links("embed")[0].info
        if not info.embedding_size:
            raise RequestRejected("this service's engine gives no embeddings; they are for CPUs so far (engine.device)")
        return ServedModel(self.names, info, self.limits.max_sequences)

    @property
    def names(self) -> list[str]:
        return [self.model_name, *self.other_names]

    def adapter(self, name: str) -> Adapter | None:
        """The LoRA adapter of this name; None for the model itself. Raises ModelNotFound."""
        if name in self.names:
            return None
        check_name([*self.names, *self.fleet.adapters], name)
        return self.fleet.adapters[name]

    @property
    def known_info(self) -> ModelInfo | None:
        if self._info is None and (links := self._all_links()):
            self._info = links[0].info.with_end_id(self.tokenizer.eos_id)
        return self._info

    def _all_links(self) -> Sequence[GangLink]:
        roles: tuple[Role, ...] = ("decode", "prefill", "embed")
        return [link for role in roles for link in self.fleet.links(role)]

    async def info(self) -> ModelInfo:
        """Raises NotReady if no gang comes up in time."""
        if self.known_info is None:
            await self.fleet.wait_link(self.limits.ready_timeout_s)
        if (info := self.known_info) is None:
            raise NotReady("no gang is ready to take requests", retry_after_s=5.0)
        return info
