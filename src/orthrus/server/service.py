"""The state that the routes of one server share: its model once it is loaded, its engine's loop, and its counters."""

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from time import time

from orthrus.api import Orthrus
from orthrus.engine.request import Request
from orthrus.server.calls import Call
from orthrus.server.errors import ApiError, not_ready
from orthrus.server.live_audit import LiveAudit
from orthrus.server.loop import EngineLoop
from orthrus.server.metrics import Metrics
from orthrus.server.params import UnknownFields
from orthrus.server.receipts import Receipts
from orthrus.server.settings import ServeConfig
from orthrus.server.tokens import TokenBytes
from orthrus.server.traffic import TrafficLog

log = logging.getLogger("orthrus.server")


class Live:
    """A loaded model that answers. on_death: called in the event loop if its thread has failed."""

    def __init__(
        self,
        orthrus: Orthrus,
        config: ServeConfig,
        metrics: Metrics,
        traffic: TrafficLog | None = None,
        *,
        on_death: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.orthrus, self.config = orthrus, config
        self._metrics, self._traffic = metrics, traffic
        self.audit = LiveAudit(orthrus, config.audit_share, lambda: self.loop.wake())
        self.loop = EngineLoop(orthrus, config, self._ended, self.audit, on_death)
        self.receipts = Receipts(orthrus)
        metrics.watch(orthrus.engine, self.audit)
        self.token_bytes = TokenBytes(orthrus.base.tokenizer)
        self.created = int(time())
        self.fingerprint = str(orthrus.describe().get("base_fingerprint") or "")[:16] or None
        own = orthrus.base.name
        # The default model is called "default (NAME)".
        bare = own.removeprefix("default (").removesuffix(")") if own.startswith("default (") else own
        self.name = config.names[0] if config.names else bare
        self._names = {*config.names, self.name, "default"} | (set() if config.names else {own})

    def _ended(self, call: Call, index: int, request: Request) -> None:
        """Pass an answer that has ended to the metrics, the audit and the traffic log, once."""
        self._metrics.ended(call, index, request)
        self.audit.offer(call, index, request)
        if self._traffic is not None:
            self._traffic.offer(self.orthrus, call, request)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served. Without a name, the request is for the served model."""
        if name is not None and name not in self._names and not self.config.any_model:
            raise ApiError(
                404,
                f"The model {ascii(name)[:120]} is not served here: use {self.name!r}.",
                param="model",
                code="model_not_found",
            )


class Service:
    """The state of one server. `load` runs in a thread. Until it is done, `live` raises a 503.

    on_failure: called in the event loop if the model cannot answer (any more), after `failure` was set. Raises
    UserInputError and StorageError for a traffic log that cannot be written.
    """

    def __init__(self, load: Callable[[], Orthrus], config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.traffic = None if config.log_traffic is None else TrafficLog(config.log_traffic)
        self.unknown = UnknownFields()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.loaded = asyncio.Event()
        self._load = load
        self._live: Live | None = None

    def start(self) -> None:
        """Begin to load the model. Call it in the event loop."""
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                report = partial(self._loaded, self._load())
            except BaseException as error:
                report = partial(self._failed, error)
            try:
                loop.call_soon_threadsafe(report)
            except RuntimeError:
                log.debug("the event loop is closed")

        threading.Thread(target=load, name="orthrus-load", daemon=True).start()

    def _loaded(self, orthrus: Orthrus) -> None:
        try:
            self._live = Live(orthrus, self.config, self.metrics, self.traffic, on_death=self._failed)
        except Exception as error:
            self._failed(error)
            return
        self.loaded.set()
        log.info("ready", extra={"data": {"model": self._live.name}})

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self.loaded.set()
        self.on_failure()

    @property
    def live(self) -> Live:
        """The model. Raises ApiError while it is loading."""
        if self._live is None:
            raise not_ready("loading")
        return self._live

    @property
    def ready(self) -> Live:
        """As `live`, but raises ApiError also while the server is draining."""
        if self.live.loop.draining:
            raise not_ready("draining")
        return self.live

    async def drain(self, seconds: float) -> None:
        """Let running answers end for so many seconds at most. Then cancel them."""
        if self._live is not None:
            about = {"open_answers": len(self._live.loop.calls), "seconds_at_most": seconds}
            log.info("draining", extra={"data": about})
            await self._live.loop.drain(seconds)

    def end_all(self) -> None:
        """End all answers now."""
        if self._live is not None:
            self._live.loop.end_all()

    def close(self) -> None:
        """Stop the threads."""
        if self._live is not None:
            self._live.audit.stop()
            self._live.loop.end_all()
            self._live.loop.close()
        if self.traffic is not None:
            self.traffic.close()
