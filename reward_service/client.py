"""Reward models elsewhere, behind the ``Scorer`` protocol: over a Serve handle or over HTTP.

Both retry what a dying replica or a busy server lost (scoring has no side effect), give up at a
deadline, and never return a partial answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reward_service.config import WireFormat
from reward_service.encoding import Truncation
from reward_service.isolation import Isolation, KeepsFailing, Part, Refused, Unreadable
from reward_service.score import ModelScores, NotLoaded, RewardUnavailable, ScoreItem
from reward_service.wire_clients import SPOKEN

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

RETRY_PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pause before each further try; the last one repeats."""

TRIED_AGAIN = (408, 429, 500, 502, 503, 504)
NO_ITEMS_FAULT = (401, 402, 403, 404, 405, 407)
"""Statuses that speak of the address or of who asks, not of what is to be scored."""

GIVE_UP_AFTER = 4
"""A server that never scored anything is not asked on after it refused so many items at once."""


class HandleScorer:
    """Scores over a Serve handle: what PPO uses, one call for a whole list."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        model: str,
        num_replicas: int,
        timeout_s: float,
        max_retries: int,
    ) -> None:
        self._handle = handle
        self._model = model
        self._num_replicas = num_replicas
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        """Score a list, in order, spread over the replicas.

        While a new version is being loaded replicas may differ for a moment; the list is then
        scored again, so that one answer is of one version.

        Raises:
            TimeoutError: No answer within the deadline.
            RewardUnavailable: The replicas kept dying, or the versions kept mixing.
            RuntimeError: The model failed.
        """
        if not items:
            raise ValueError("nothing to score: the list of items is empty")
        share = math.ceil(len(items) / self._num_replicas)
        chunks = [items[i : i + share] for i in range(0, len(items), share)]
        deadline = time.monotonic() + self._timeout_s
        return _of_one_version(
            lambda: self._ask_all(chunks, truncation, deadline), self._max_retries, deadline
        )

    def _ask_all(
        self, chunks: Sequence[Sequence[ScoreItem]], truncation: Truncation, deadline: float
    ) -> list[ModelScores]:
        calls = [self._handle.score_batch.remote(list(chunk), truncation) for chunk in chunks]
        return [
            self._result(call, chunk, truncation, deadline)
            for call, chunk in zip(calls, chunks, strict=True)
        ]

    def _result(
        self, call: Any, chunk: Sequence[ScoreItem], truncation: Truncation, deadline: float
    ) -> ModelScores:
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        lost = tries = 0
        while True:
            try:
                answer: ModelScores = call.result(timeout_s=max(0.0, deadline - time.monotonic()))
                return answer
            except TimeoutError:
                raise TimeoutError(
                    f"reward model {self._model!r} did not score {len(chunk)} items within "
                    f"{self._timeout_s:g} s: raise reward.service.timeout_s or add replicas"
                ) from None
            except BackPressureError:  # nothing is wrong: it is asked again until the deadline
                pass
            except (RayActorError, DeploymentUnavailableError) as error:
                lost += 1
                if lost > self._max_retries:
                    raise RewardUnavailable(
                        f"reward model {self._model!r} was lost {lost} times under the same "
                        f"request ({type(error).__name__}): look at the replica's log for the "
                        "cause, often too little memory"
                    ) from error
            except RayTaskError as error:
                if not isinstance(error.cause, NotLoaded):
                    raise RuntimeError(
                        f"reward model {self._model!r} failed: {error.cause}"
                    ) from error
                lost += 1
                if lost > self._max_retries:
                    raise RewardUnavailable(
                        f"reward model {self._model!r} is not loaded: {error.cause}"
                    ) from error
            time.sleep(retry_pause(tries, deadline))
            tries += 1
            call = self._handle.score_batch.remote(list(chunk), truncation)


class HttpScorer:
    """Scores over HTTP: ``POST /v1/score`` of a server of ours, or another system's format.

    An item that the server does not score fails alone, with the reason, whether the answer says so
    of that item or the whole request was refused for it (``isolation``). Servers of other systems
    say neither which version scored nor how they cut long texts; ``truncation`` has no effect on
    them.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout_s: float = 120.0,
        max_retries: int = 3,
        items_per_request: int = 64,
        format: WireFormat = "native",
        token: str | None = None,
    ) -> None:
        """``url`` is the server's root, or the endpoint itself for ``openrlhf`` and ``slime``.

        Nothing is sent yet. A token may also be the password in the URL.
        """
        import httpx

        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"reward url {_without_secret(url)!r} must begin with http://host")
        self._format = None if format == "native" else SPOKEN[format]
        path = "/v1/score" if self._format is None else self._format.path
        root = url.rstrip("/")
        self._endpoint = root if path and root.endswith(path) else root + path
        most = None if self._format is None else self._format.most_items
        self._shown = _without_secret(self._endpoint)
        self._model = model
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._items_per_request = min(items_per_request, most or items_per_request)
        self._scored: ScoreItem | None = None
        """Some item that the server has scored."""
        loopback = parsed.host in ("127.0.0.1", "localhost", "::1")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(
            timeout=timeout_s,
            trust_env=not loopback,
            headers=headers,
            # Reading the certificates takes longer than scoring a text; plain HTTP needs none.
            verify=parsed.scheme == "https",
        )

    def close(self) -> None:
        self._client.close()

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        """Score a list, in order, a few requests one after the other.

        Raises:
            ValueError: The address or the token is wrong, or a server that never scored anything
                refuses all of several items (4xx); its message is passed on.
            TimeoutError: No answer within the deadline.
            RewardUnavailable: The server cannot be reached or keeps failing.
            RuntimeError: A server that never scored anything answers nonsense.
        """
        if not items:
            raise ValueError("nothing to score: the list of items is empty")
        deadline = time.monotonic() + self._timeout_s
        return _of_one_version(
            lambda: self._ask_all(items, truncation, deadline), self._max_retries, deadline
        )

    def _ask_all(
        self, items: Sequence[ScoreItem], truncation: Truncation, deadline: float
    ) -> list[ModelScores]:
        def ask(chunk: Sequence[ScoreItem], patient: bool) -> ModelScores:
            return self._request(chunk, truncation, deadline, patient)

        def still_works() -> None:
            if self._scored is None:
                return
            try:
                ask([self._scored], False)
            except (Refused, Unreadable) as error:
                raise RewardUnavailable(f"what it has scored before fails too: {error}") from error

        isolation = Isolation(ask, still_works)
        size = self._items_per_request
        parts: list[Part] = []
        for start in range(0, len(items), size):
            parts += isolation.parts(items[start : start + size])
        self._remember(items, parts)
        return self._answered(parts)

    def _remember(self, items: Sequence[ScoreItem], parts: Sequence[Part]) -> None:
        """Note an item that was scored; raise when nothing ever was and items are not to blame.

        Decided at the end of a call, so that the order of its items does not matter.
        """
        scores = [s for p in parts for s in (p.scores if isinstance(p, ModelScores) else (None,))]
        scored = [item for item, score in zip(items, scores, strict=True) if score is not None]
        if scored:
            self._scored = scored[0]
        failed = [part for part in parts if not isinstance(part, ModelScores)]
        if self._scored is not None or not failed:
            return
        if len(failed) >= GIVE_UP_AFTER or isinstance(failed[0], KeepsFailing):
            raise failed[0]

    def _answered(self, parts: Sequence[Part]) -> list[ModelScores]:
        """Items that failed alone as answers of the version that scored the others."""
        some = next((part for part in parts if isinstance(part, ModelScores)), None)
        return [
            part
            if isinstance(part, ModelScores)
            else ModelScores(
                model=some.model if some else self._model or "remote",
                version=some.version if some else "unknown",
                fingerprint=some.fingerprint if some else "",
                scores=(None,),
                tokens=(0,),
                errors=(str(part),),
            )
            for part in parts
        ]

    def _request(
        self, items: Sequence[ScoreItem], truncation: Truncation, deadline: float, patient: bool
    ) -> ModelScores:
        """One request, sent again while that may help; after a 500 only if ``patient``."""
        import httpx

        body = self._body(items, truncation)
        problem, tries = "", 0
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self._client.post(self._endpoint, json=body, timeout=left)
            except httpx.TimeoutException:
                break
            except httpx.TransportError as error:
                status, problem = 0, f"cannot be reached ({type(error).__name__})"
            else:
                status = answer.status_code
                if status == 200:
                    return self._read(answer, len(items))
                problem = f"answered {status}: {_message(answer)}"
                if status not in TRIED_AGAIN:
                    of_items = 400 <= status < 500 and status not in NO_ITEMS_FAULT
                    raise (Refused if of_items else ValueError)(f"{self._shown} {problem}")
            tries += 1
            if tries > self._max_retries or (status == 500 and not patient):
                raise (KeepsFailing if status == 500 else RewardUnavailable)(
                    f"{self._shown} {problem}, {tries} times: check that the server runs"
                )
            time.sleep(retry_pause(tries - 1, deadline))
        raise TimeoutError(
            f"{self._shown} did not answer within {self._timeout_s:g} s"
            f"{' and ' + problem if problem else ''}: raise reward.service.timeout_s"
        )

    def _body(self, items: Sequence[ScoreItem], truncation: Truncation) -> dict[str, Any]:
        if self._format is not None:
            return self._format.write(items, self._model)
        body: dict[str, Any] = {"items": [_to_json(i) for i in items], "truncation": truncation}
        return body if self._model is None else body | {"model": self._model}

    def _read(self, answer: Any, count: int) -> ModelScores:
        """Check an answer down to every number: a server is outside and may say anything."""
        try:
            if self._format is None:
                return _read_native(answer.content, count)
            values = self._format.read(answer.json(), count)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            why = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise Unreadable(f"{self._shown} answered nonsense: {why}") from None
        return ModelScores(
            model=answer.headers.get("X-Reward-Model", self._model or "remote"),
            version=answer.headers.get("X-Reward-Model-Version", "unknown"),
            fingerprint=answer.headers.get("X-Reward-Model-Fingerprint", ""),
            scores=tuple(None if isinstance(v, str) else v for v in values),
            tokens=(0,) * count,
            errors=tuple(f"{self._shown}: {v}" if isinstance(v, str) else None for v in values),
        )


def _read_native(content: bytes, count: int) -> ModelScores:
    """Raises ValueError for what is no answer to so many items."""
    from pydantic import ValidationError

    from reward_service.http_bodies import ScoreResponse

    try:
        response = ScoreResponse.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None
    if [entry.index for entry in response.data] != list(range(count)):
        raise ValueError(f"{len(response.data)} scores for {count} items")
    return ModelScores(
        model=response.model,
        version=response.version,
        fingerprint=response.fingerprint,
        scores=tuple(entry.score for entry in response.data),
        tokens=tuple(entry.tokens for entry in response.data),
        errors=tuple(entry.error for entry in response.data),
    )


def _of_one_version(
    ask: Callable[[], list[ModelScores]], max_retries: int, deadline: float
) -> ModelScores:
    """Chunks of one call as one answer; asked again when a reload came in between."""
    for tries in range(max_retries + 1):
        answers = ask()
        versions = {answer.version for answer in answers}
        if len(versions) == 1:
            return _joined(answers)
        if tries < max_retries:
            time.sleep(retry_pause(tries, deadline))
    raise RewardUnavailable(
        f"reward model {answers[0].model!r} changed between versions {sorted(versions)} within "
        f"each of {max_retries + 1} calls: score these items again"
    )


def _joined(answers: Sequence[ModelScores]) -> ModelScores:
    first = answers[0]
    return ModelScores(
        model=first.model,
        version=first.version,
        fingerprint=first.fingerprint,
        scores=tuple(s for answer in answers for s in answer.scores),
        tokens=tuple(t for answer in answers for t in answer.tokens),
        errors=tuple(e for answer in answers for e in answer.errors),
        probability=first.probability,
    )


def retry_pause(tries: int, deadline: float) -> float:
    """Seconds to wait before the next try, the deadline permitting."""
    pause = RETRY_PAUSES_S[min(tries, len(RETRY_PAUSES_S) - 1)]
    return max(0.0, min(pause, deadline - time.monotonic()))


def _to_json(item: ScoreItem) -> dict[str, Any]:
    if item.ids is not None:
        return {"prompt_ids": list(item.ids.prompt), "response_ids": list(item.ids.response)}
    prompt: Any = [dict(m) for m in item.messages] if item.messages else item.prompt
    return {"prompt": prompt, "response": item.response}


def _message(answer: Any) -> str:
    """The server's own words where it has some, cut to one line."""
    try:
        return str(answer.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:200] or "no message"


def _without_secret(url: str) -> str:
    """A URL as it may be printed: ``http://name:token@host`` loses name and token."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path
