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
from reward_service.score import ModelScores, RewardUnavailable, ScoreItem
from reward_service.wire_clients import SPOKEN

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

RETRY_PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pause before each further try; the last one repeats."""


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
                raise RuntimeError(f"reward model {self._model!r} failed: {error.cause}") from error
            time.sleep(retry_pause(tries, deadline))
            tries += 1
            call = self._handle.score_batch.remote(list(chunk), truncation)


class HttpScorer:
    """Scores over HTTP: ``POST /v1/score`` of a server of ours, or another system's format.

    Servers of other systems say neither which version scored nor how they cut long texts;
    ``truncation`` has no effect on them.
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
        loopback = parsed.host in ("127.0.0.1", "localhost", "::1")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(timeout=timeout_s, trust_env=not loopback, headers=headers)

    def close(self) -> None:
        self._client.close()

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        """Score a list, in order, a few requests one after the other.

        Raises:
            ValueError: The server refused the request (4xx); its message is passed on.
            TimeoutError: No answer within the deadline.
            RewardUnavailable: The server cannot be reached or keeps failing.
            RuntimeError: The server answers nonsense.
        """
        if not items:
            raise ValueError("nothing to score: the list of items is empty")
        deadline = time.monotonic() + self._timeout_s
        size = self._items_per_request
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        return _of_one_version(
            lambda: [self._request(chunk, truncation, deadline) for chunk in chunks],
            self._max_retries,
            deadline,
        )

    def _request(
        self, items: Sequence[ScoreItem], truncation: Truncation, deadline: float
    ) -> ModelScores:
        import httpx

        body = self._body(items, truncation)
        problem = ""
        for tries in range(self._max_retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                answer = self._client.post(self._endpoint, json=body, timeout=left)
            except httpx.TimeoutException:
                break
            except httpx.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__})"
            else:
                if answer.status_code == 200:
                    if self._format is None:
                        return self._read(answer.content, len(items))
                    return self._read_foreign(answer, len(items))
                problem = f"answered {answer.status_code}: {_message(answer)}"
                if answer.status_code not in (408, 429, 500, 502, 503, 504):
                    raise ValueError(f"{self._shown} {problem}")
            if tries == self._max_retries:
                raise RewardUnavailable(
                    f"{self._shown} {problem}, {tries + 1} times: check that the server runs"
                )
            time.sleep(retry_pause(tries, deadline))
        raise TimeoutError(
            f"{self._shown} did not answer within {self._timeout_s:g} s"
            f"{' and ' + problem if problem else ''}: raise reward.service.timeout_s"
        )

    def _body(self, items: Sequence[ScoreItem], truncation: Truncation) -> dict[str, Any]:
        if self._format is not None:
            return self._format.write(items, self._model)
        body: dict[str, Any] = {"items": [_to_json(i) for i in items], "truncation": truncation}
        return body if self._model is None else body | {"model": self._model}

    def _read_foreign(self, answer: Any, count: int) -> ModelScores:
        assert self._format is not None
        try:
            scores = self._format.read(answer.json(), count)
        except (ValueError, TypeError, LookupError) as error:
            why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
            raise RuntimeError(f"{self._shown} answered nonsense: {why}") from None
        return ModelScores(
            model=answer.headers.get("X-Reward-Model", self._model or "remote"),
            version=answer.headers.get("X-Reward-Model-Version", "unknown"),
            fingerprint=answer.headers.get("X-Reward-Model-Fingerprint", ""),
            scores=tuple(scores),
            tokens=(0,) * count,
            errors=(None,) * count,
        )

    def _read(self, content: bytes, count: int) -> ModelScores:
        """Check an answer down to every number: a server is outside and may say anything."""
        from pydantic import ValidationError

        from reward_service.http_bodies import ScoreResponse

        try:
            response = ScoreResponse.model_validate_json(content)
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
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RuntimeError(
                f"{self._shown} answered nonsense: {where}: {first['msg']}"
            ) from None
        except ValueError as error:
            raise RuntimeError(f"{self._shown} answered nonsense: {error}") from None


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
