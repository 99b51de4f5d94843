"""The Ray actor that generates: one engine, one thread that steps it, asyncio methods around it.

::

    Ray calls (event loop)  --commands-->  engine thread: commands, then one step, and again
          ^                                        |
          +------- outcomes, as they finish -------+

Only the engine thread touches the engine. It sleeps on its command queue while there is nothing
to decode; a command put there wakes it. When a step raises, the engine is lost: everything in
flight is answered with the reason and every later call raises it, until the pool replaces the
actor.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.config import EngineConfig
from actors.engine import VLLMEngine
from actors.generation import Completion, ControlCall, Engine, EngineLost, SampleRequest
from actors.trajectory import Float32Array, Int32Array
from actors.weights import Probe, UpdateConfirmation, WeightsLost, WeightUpdate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A request that ended without a completion, and why."""

    request_id: str
    reason: str
    engine_lost: bool = False


Outcome = Completion | Refused


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a pool must know of an engine that has started.

    Attributes:
        pid: Its process, on Ray's node ``node_id``.
        created: When that process began, as psutil tells it: a pid alone may be reused.
    """

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pid: int
    created: float
    node_id: str


class EngineThread:
    """Owns an engine: builds it, steps it, and runs commands between steps.

    Args:
        build: Makes the engine; called on the thread, because OpenMP keeps a team of workers
            for each thread that calls it.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._waiting: dict[str, Callable[[Outcome], None]] = {}
        self._lost: EngineLost | None = None
        self._closing = threading.Lock()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Future[None]:
        """Done when the engine can be used; carries the error when it cannot be built."""
        self._thread.start()
        return self._started

    def call(self, command: Callable[[Engine], T]) -> Future[T]:
        """Run ``command`` on the engine thread, between two steps."""
        future: Future[T] = Future()
        with self._closing:  # no command may slip in behind the last one that is answered
            if self._lost is None:
                self._commands.put((command, future))
            else:
                future.set_exception(self._lost)
        return future

    def submit(
        self, requests: Sequence[SampleRequest], deliver: Callable[[Outcome], None]
    ) -> Future[None]:
        """Queue requests; ``deliver`` is called on the engine thread, once for each."""

        def add(engine: Engine) -> None:
            for request in requests:
                try:
                    engine.add(request)
                except (ValueError, RuntimeError) as error:
                    deliver(Refused(request_id=request.request_id, reason=str(error)))
                else:
                    self._waiting[request.request_id] = deliver

        return self.call(add)

    def abort(self, request_ids: Sequence[str] | None = None) -> Future[None]:
        """End requests (all of them by default) without a completion."""

        def end(engine: Engine) -> None:
            ids = list(self._waiting) if request_ids is None else list(request_ids)
            engine.abort(ids)
            for request_id in ids:
                if deliver := self._waiting.pop(request_id, None):
                    deliver(Refused(request_id=request_id, reason="aborted"))

        return self.call(end)

    def _run(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while True:
                self._run_commands(engine)
                for completion in engine.step():
                    if deliver := self._waiting.pop(completion.request_id, None):
                        deliver(completion)
        except BaseException as error:
            self._lose(error)
        finally:
            engine.shutdown()

    def _run_commands(self, engine: Engine) -> None:
        """Run what is queued, waiting while there is nothing to decode."""
        while True:
            try:
                command, future = self._commands.get(block=not engine.busy)
            except queue.Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command(engine))
            except Exception as error:
                future.set_exception(error)
                if isinstance(error, EngineLost):
                    raise

    def _lose(self, error: BaseException) -> None:
        with self._closing:
            self._lost = error if isinstance(error, EngineLost) else EngineLost(repr(error))
        for request_id, deliver in self._waiting.items():
            deliver(Refused(request_id=request_id, reason=str(self._lost), engine_lost=True))
        self._waiting.clear()
        while not self._commands.empty():
            self._commands.get()[1].set_exception(self._lost)


class RolloutActor:
    """One generation engine as a Ray actor. Start it, then it serves until it is killed."""

    def __init__(self, name: str, model_dir: str, config: EngineConfig, tolerance: float) -> None:
        self._name = name
        self._model_dir = Path(model_dir)
        self._config = config
        self._tolerance = tolerance
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        """What Ray's dashboard and log lines call this actor."""
        return self._name

    async def start(self) -> EngineInfo:
        """Build the engine.

        Raises:
            FileNotFoundError: the model directory lacks weights or tokenizer.
            RuntimeError: vLLM is missing, or cannot serve the model.
        """
        import psutil
        import ray

        self._tokenizer = load_tokenizer(self._model_dir)
        eos = eos_token_ids(self._model_dir, self._tokenizer)
        self._engine = EngineThread(
            lambda: VLLMEngine(self._model_dir, self._config, eos_token_ids=eos, name=self._name)
        )
        await asyncio.wrap_future(self._engine.start())
        context, vocabulary = await self._call(lambda e: (e.context_length, e.vocab_size))
        return EngineInfo(
            context_length=context,
            vocab_size=vocabulary,
            eos_token_ids=eos,
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[list[Outcome]]:
        """Stream outcomes, each request's once, in the order in which they finish.

        Outcomes that are there together come together. Cancelling aborts what is left.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Outcome] = asyncio.Queue()
        prompts = {request.request_id: request.token_ids for request in requests}

        def deliver(outcome: Outcome) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, outcome)

        try:
            await asyncio.wrap_future(self._engine.submit(requests, deliver))
            while prompts:
                outcomes = [await arrived.get()]
                while not arrived.empty():
                    outcomes.append(arrived.get_nowait())
                yield [self._decoded(o, prompts.pop(o.request_id)) for o in outcomes]
        finally:
            if prompts:
                self._engine.abort(list(prompts))

    async def ping(self) -> None:
        """Answer, whatever the engine is doing."""

    async def abort(self) -> None:
        """End everything in flight; done when the engine is idle."""
        await asyncio.wrap_future(self._engine.abort())

    async def load(self, update: WeightUpdate) -> UpdateConfirmation:
        """Load, verify and prove weights; see :meth:`actors.engine.VLLMEngine.load`.

        Raises:
            WeightsLost: the tensors are gone with the process that published them.
        """
        from ray.exceptions import ObjectLostError

        try:
            tensors = await update.tensors if update.published else update.tensors
        except ObjectLostError as error:
            raise WeightsLost(
                f"weight version {update.version} is gone with the process that published it:"
                f" {str(error).splitlines()[0]}"
            ) from error
        arrived = replace(update, tensors=tensors)
        return await self._call(lambda engine: engine.load(arrived, self._tolerance))

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """``[T_s - 1]`` log-probabilities of ids 1, 2, ... of each sequence, temperature 1."""
        return await self._call(lambda engine: engine.logprobs(sequences))

    # vLLM's own trainers drive these four, with records that hold init_info or update_info.

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._control("init_weight_transfer_engine", request.init_info)

    async def start_weight_update(self) -> None:
        await self._control("start_weight_update", {})

    async def update_weights(self, request: Any) -> None:
        await self._control("update_weights", request.update_info)

    async def finish_weight_update(self) -> None:
        """The engine serves again only after :meth:`confirm`."""
        await self._control("finish_weight_update", {})

    async def confirm(self, version: int, probe: Probe | None) -> tuple[float, float]:
        """Prove weights that came by the four calls above; largest and mean ``|Δ log p|``."""
        return await self._call(lambda e: e.confirm(version, probe, self._tolerance))

    async def _control(self, call: ControlCall, payload: Mapping[str, Any]) -> None:
        await self._call(lambda engine: engine.control(call, payload))

    async def _call(self, command: Callable[[Engine], T]) -> T:
        return await asyncio.wrap_future(self._engine.call(command))

    def _decoded(self, outcome: Outcome, prompt_ids: Int32Array) -> Outcome:
        if isinstance(outcome, Refused):
            return outcome
        text = response_text(self._tokenizer, prompt_ids, outcome.token_ids)
        return replace(outcome, text=text)


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a Hugging Face directory.

    Raises:
        FileNotFoundError: there is none, so responses could not be decoded for the reward.
    """
    from transformers import AutoTokenizer

    if not (model_dir / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"{model_dir} holds no tokenizer (tokenizer_config.json): save the tokenizer there,"
            " beside the weights"
        )
    return AutoTokenizer.from_pretrained(model_dir)


def eos_token_ids(model_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return tuple(sorted(found))


def response_text(tokenizer: Any, prompt_ids: Int32Array, response_ids: Int32Array) -> str:
    """The response as it continues the prompt, without special tokens.

    Decoded together with the end of the prompt: tokenizers of the SentencePiece family drop the
    space that a text begins with, which would glue the response to its prompt.
    """
    tail = [int(i) for i in prompt_ids[-8:]]
    ids = [int(i) for i in response_ids]

    def decode(part: list[int]) -> str:
        text: str = tokenizer.decode(
            part, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    before, whole = decode(tail), decode(tail + ids)
    return whole[len(before) :] if whole.startswith(before) else decode(ids)
