"""A run that asks people, on real parts: candidates from vLLM, answers over HTTP from a page of its
own, then the reward model and PPO. ``python -m tests.people_loop`` does rounds of it, with a kill.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

from cluster.config import load_config, write_config
from cluster.pipeline import Pipeline
from reward_service.feedback import people
from reward_service.feedback.store import FeedbackStore
from tests import same_run
from tests.people_loop import CHANGES, OVERLAP, PAIRS, Person
from tests.reward_service.page_load import free_port, start_page


def test_a_run_waits_for_people_and_goes_on(
    ray_session: None, tiny_llama: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "ppo": {"steps": 1, "epochs": 1}}
    path = same_run.write_config(tmp_path, run_dir, tiny_llama, **changes)
    config = load_config(path)
    run_dir.mkdir()
    write_config(config, run_dir / "config.yaml")
    end, port = threading.Event(), free_port()
    page = start_page(run_dir, port)
    try:
        with FeedbackStore(run_dir / "feedback.sqlite") as store:
            tokens = [people.invite(store.database, days=1)[1] for _ in range(OVERLAP)]
        crowd = [Person(f"http://127.0.0.1:{port}", t, n, end) for n, t in enumerate(tokens)]
        for person in crowd:
            person.start()
        Pipeline(config, resume=False, overwrite=False).run()
        assert page.poll() is None, "the page outlives training"
    finally:
        end.set()
        page.send_signal(signal.SIGTERM)
        page.wait(timeout=30)
    for person in crowd:
        person.join(timeout=60)
    stages = json.loads((run_dir / "stages.json").read_text())
    assert list(stages) == ["collect", "reward", "ppo", "evaluate", "report"]
    assert stages["collect"]["comparisons"] == OVERLAP * PAIRS
    with FeedbackStore(run_dir / "feedback.sqlite") as store:
        said, everything = store.comparisons(), store.comparison_history()
    assert len({(c.pair.item_id, c.annotator.annotator_id) for c in said}) == OVERLAP * PAIRS
    assert len(everything) == sum(person.answers for person in crowd)
    assert {c.pair.a.model for c in said} == {"policy"}
    assert stages["reward"]["train_pairs"] > 0
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert [c["name"] for c in evaluation["checkpoints"]] == ["reference", "ppo"]
    rows = (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]
