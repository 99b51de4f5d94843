"""People and training together, on real parts: the loop asks, people answer over HTTP, it goes on.

    python -m tests.people_loop --place /tmp/people --rounds 2 --kill

``rlhf loop`` on a tiny model (Ray, vLLM, Serve, RLlib) with ``collect.source: people``; the page as
a process of its own, which outlives training; and simulated people who sign in, agree and judge
whatever they are shown, until the loop has ended. With --kill the loop is killed with SIGKILL at a
random moment of its second round, and resumed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from reward_service.feedback import people
from reward_service.feedback.assignment import open_answers
from reward_service.feedback.store import FeedbackStore
from tests.conftest import make_llama
from tests.kill_and_resume import Run
from tests.reward_service.page_load import CHOICES, HIDDEN, free_port, start_page
from tests.same_run import write_config

PAIRS = 16
OVERLAP = 2
ROUND_S = 900.0
CHANGES: dict[str, Any] = {
    "collect": {
        "source": "people",
        "pairs": PAIRS,
        "people": {"overlap": OVERLAP, "repeat_share": 0.1, "repeat_gap": 3, "wait_hours": 0.25},
    },
    "reward_model": {"epochs": 1},
    "reward": {"terms": []},
    "ppo": {"steps": 2, "checkpoint_every": 1},
    "loop": {"earlier_policies": 1},
}


class Person(threading.Thread):
    """Signs in, agrees, and judges what there is, like somebody who keeps the page open."""

    def __init__(self, url: str, token: str, seed: int, end: threading.Event) -> None:
        super().__init__(daemon=True)
        self._client = httpx.Client(base_url=url, timeout=60, follow_redirects=True)
        self._token = token
        self._random = random.Random(seed)
        self._end = end
        self.answers = 0

    def run(self) -> None:
        page = self._client.get(f"/join/{self._token}")
        page = self._send("/sign-in", page, token=self._token)
        assert page.url.path == "/welcome", page.text
        page = self._send("/welcome", page, agree="yes")
        while not self._end.is_set():
            if "assignment" in dict(HIDDEN.findall(page.text)):
                page = self._send("/judge", page, choice=self._random.choice(CHOICES))
                self.answers += 1
            else:
                self._end.wait(0.5)
                page = self._client.get("/judge")

    def _send(self, path: str, page: httpx.Response, **fields: str) -> httpx.Response:
        found = self._client.post(path, data={**dict(HIDDEN.findall(page.text)), **fields})
        assert found.status_code == 200, (path, found.status_code, found.text)
        return found


def loop_with_people(place: Path, *, rounds: int, seed: int | None = None) -> dict[str, Any]:
    """The loop to its end, killed once in its second round when a seed is given."""
    model = make_llama(place / "model", tied=True)
    changes = {**CHANGES, "loop": {**CHANGES["loop"], "rounds": rounds}}
    config = write_config(place, place / "run", model, **changes)
    run_dir = config.with_suffix("")
    run = Run(config, resume=False, command="loop")
    _wait(lambda: (run_dir / "config.yaml").exists(), run, 120)
    port = free_port()
    page = start_page(run_dir, port)
    end = threading.Event()
    kills = "none"
    try:
        with FeedbackStore(run_dir / "feedback.sqlite") as store:
            tokens = [people.invite(store.database, days=1)[1] for _ in range(OVERLAP)]
        crowd = [Person(f"http://127.0.0.1:{port}", t, n, end) for n, t in enumerate(tokens)]
        for person in crowd:
            person.start()
        if seed is not None:
            # A first round says how long one takes; the kill falls somewhere within the second.
            began = time.monotonic()
            _wait(lambda: _done(run_dir, 1), run, ROUND_S)
            pause = random.Random(seed).random() * (time.monotonic() - began)
            time.sleep(pause)
            run.kill()
            kills = f"{pause:.0f} s into round 2, after {sorted(_stages(run_dir, 2))}"
            assert run.left() == []
            run = Run(config, resume=True, command="loop")
        _wait(lambda: run.process.poll() is not None, run, rounds * ROUND_S)
        run.finish()
        assert page.poll() is None, "the page outlives training"
    finally:
        run.process.kill()
        end.set()
        page.send_signal(signal.SIGTERM)
        page.wait(timeout=30)
    for person in crowd:
        person.join(timeout=60)
    return {"kill": kills, "answers": sum(p.answers for p in crowd), **_outcome(run_dir, rounds)}


def _outcome(run_dir: Path, rounds: int) -> dict[str, Any]:
    with FeedbackStore(run_dir / "feedback.sqlite") as store:
        given, wanted = store.database.read(open_answers)
        said = store.comparisons()
        history = store.comparison_history()
    loop = json.loads((run_dir / "loop.json").read_text())
    return {
        "given": given,
        "wanted": wanted,
        "comparisons": len(said),
        "second looks": sum(entry.repeat for entry in history),
        "policies": sorted({c.model for s in said for c in (s.pair.a, s.pair.b)}),
        "rounds done": [entry["done"] for entry in loop["rounds"]],
        "compared": [
            [c["name"] for c in _json(run_dir, n, "evaluation.json")["checkpoints"]]
            for n in range(1, rounds + 1)
        ],
        "judgements": [entry["judgements"] for entry in loop["rounds"]],
    }


def _json(run_dir: Path, number: int, name: str) -> Any:
    path = run_dir / f"round-{number:02d}" / name
    return json.loads(path.read_text()) if path.is_file() else {}


def _stages(run_dir: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = _json(run_dir, number, "stages.json")
    return found


def _done(run_dir: Path, number: int) -> bool:
    return "report" in _stages(run_dir, number)


def _wait(condition: Any, run: Run, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if run.process.poll() not in (None, 0):
            raise RuntimeError(f"the loop ended with {run.process.returncode}:\n{run.tail()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the loop is not that far after {seconds:.0f} s:\n{run.tail()}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--place", type=Path, required=True, help="made, must not exist")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the moment of the kill")
    options = parser.parse_args()
    options.place.mkdir(parents=True)
    seed = options.seed if options.kill else None
    print(json.dumps(loop_with_people(options.place, rounds=options.rounds, seed=seed)))


if __name__ == "__main__":
    main()
