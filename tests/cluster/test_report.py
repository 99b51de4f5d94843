"""The page of a run: complete, partial, empty and hostile run directories."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from cluster.evaluation import read_evaluation, write_evaluation
from cluster.plots import compact, plot_quickstart_summary, smooth
from cluster.report import duration, write_report
from cluster.report_texts import echoes, headline
from cluster.run_files import read_run, without_secrets
from tests.cluster.synthetic_run import write_synthetic_run

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "g", "line"}


class Page(html.parser.HTMLParser):
    """What a test asks of a page: its tags, ids, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def finished_source(finished_run: Path) -> str:
    """The page of the finished run, made once."""
    started = time.process_time()
    path = write_report(finished_run)
    assert time.process_time() - started < 10
    assert path == finished_run / "report.html"
    assert path.stat().st_size < 3_000_000
    return path.read_text(encoding="utf-8")


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "quickstart"))


@pytest.fixture
def light_run(run_dir: Path) -> Path:
    """The finished run without its curves, which take most of the time."""
    for directory in ("base", "sft", "reward_model", "ppo"):
        shutil.rmtree(run_dir / directory)
    return run_dir


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_finished_run_is_told_whole(finished_run: Path, finished_source: str) -> None:
    evaluation = read_evaluation(finished_run)
    sft, ppo = evaluation.checkpoints
    assert sft.good_share is not None
    assert ppo.good_share is not None
    page = Page(finished_source)
    assert (
        f"PPO raised the share of good texts from {sft.good_share.value:.0%} "
        f"to {ppo.good_share.value:.0%}"
    ) in page.text
    comparison = evaluation.comparison("ppo", "quality")
    assert comparison is not None
    assert f"PPO wins {comparison.win_rate.value:.0%} of the comparisons with SFT" in page.text
    for expected in (
        "KL to the reference", "Explained variance", "Engine against learner", "Seconds of a step",
        "Agreement with the judges", "Krippendorff's alpha", "Reward model, with most judges",
        "Always preferring the longer text", "judge-4", "Self-BLEU", "Supervised fine-tuning",
        "What true quality is made of", "generated newswire, English", "4 min 24 s", "torch",
        "Steps 38 to 40, second by second", "Who waited for what", "rollout-1",
        "420 steps, 1.25M tokens, 41.8k tokens a second, held-out loss 1.1 (perplexity 3)",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert 'class="missing"' not in finished_source
    assert page.tags.count("svg") > 25


def test_the_page_is_self_contained_and_well_formed(finished_source: str) -> None:
    page, source = Page(finished_source), finished_source
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"'(]?\s*(?:https?:)?//", source)
    assert "@import" not in source
    assert all(v.startswith(("#", "data:")) for v in page.values("href") + page.values("src"))
    assert "script" not in page.tags
    assert "default-src 'none'" in source
    assert page.unbalanced == []
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = {v[1:] for v in page.values("href") + page.values("xlink:href") if v.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", source))
    assert used <= set(ids)


def test_the_page_is_accessible(finished_source: str) -> None:
    page = Page(finished_source)
    assert ("html", "lang", "en") in page.attributes
    assert page.tags.count("h1") == 1
    levels = [int(t[1]) for t in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert page.tags.count("table") == page.tags.count("caption")
    charts = [v for tag, name, v in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(charts) == page.tags.count("svg")
    assert all(len(label) > 10 for label in charts)


def test_writing_again_gives_the_same_bytes(finished_run: Path, finished_source: str) -> None:
    assert write_report(finished_run).read_text(encoding="utf-8") == finished_source
    assert not list(finished_run.glob("*.part*"))


def test_a_run_that_has_not_begun_says_what_to_do(tmp_path: Path) -> None:
    sections = ("pretrain", "sft", "collect", "reward_model", "ppo")
    text = "".join(f"{section}: {{}}\n" for section in sections)
    (tmp_path / "config.yaml").write_text(f"run_dir: runs/x\n{text}", encoding="utf-8")
    page = page_of(tmp_path)
    assert "Nothing has run in this directory yet." in page.text
    for command in ("rlhf evaluate", "rlhf ppo", "rlhf collect", "rlhf pretrain", "rlhf sft"):
        assert f"{command} --config" in page.text


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"is not a run directory, or nothing has run"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


PARTS = ["config.yaml", "stages.json", "base", "sft", "reward_model", "feedback.json", "ppo",
         "evaluation.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "stages"),
    [
        (["evaluation.json", "stages.json"], ["evaluate"]),
        (["base", "feedback.json", "ppo/samples"], ["pretrain", "collect"]),
        (["ppo", "sft", "reward_model"], ["ppo", "sft", "reward"]),
    ],
)
def test_what_is_missing_is_named_with_its_command(
    run_dir: Path, parts: list[str], stages: list[str]
) -> None:
    for part in parts:
        path = run_dir / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run_dir)
    assert page.unbalanced == []
    for stage in stages:
        assert f"Make it with rlhf {stage} --config {run_dir}/config.yaml" in page.text


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_all_there_is(finished_run: Path, tmp_path: Path, part: str) -> None:
    source = finished_run / part
    if source.is_dir():
        shutil.copytree(source, tmp_path / part)
    else:
        shutil.copy(source, tmp_path / part)
    assert page_of(tmp_path).unbalanced == []


def test_a_run_under_way_shows_how_far_it_is(run_dir: Path) -> None:
    (run_dir / "evaluation.json").unlink()
    (run_dir / "stages.json").unlink()
    path = run_dir / "ppo" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[:12]
    path.write_text("".join(lines) + '{"stage": "ppo", "st')
    page = page_of(run_dir)
    assert "PPO has done 12 of 40 steps" in page.text
    assert "--resume" in page.text
    assert "ppo/metrics.jsonl:13: the last line is cut off" in page.text
    assert "Samples written while PPO was training" in page.text


def test_a_round_leads_to_the_page_of_all_rounds(tmp_path: Path) -> None:
    directory = tmp_path / "news" / "round-02"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("run_dir: runs/news/round-02\n")
    assert "all rounds" not in write_report(directory).read_text()
    (directory.parent / "config.yaml").write_text("run_dir: runs/news\n")
    page = write_report(directory).read_text()
    assert '<a href="../report.html">all rounds of news</a>' in page


def test_a_single_step_can_be_drawn(run_dir: Path) -> None:
    for path in run_dir.glob("*/metrics.jsonl"):
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert page_of(run_dir).unbalanced == []


def test_broken_parts_are_named_and_the_rest_is_shown(run_dir: Path) -> None:
    damage = {
        "config.yaml": "a: [b",
        "stages.json": "[]",
        "feedback.json": "{",
        "reward_model/report.json": "7",
        "evaluation.json": '{"format": 2}',
        "sft/metrics.jsonl": "no\nyes\n",
        "ppo/samples/step_000001.jsonl": '{"score": "x"}\n',
    }
    for part, text in damage.items():
        (run_dir / part).write_text(text)
    page = page_of(run_dir)
    problems = read_run(run_dir).problems
    assert len(problems) == len(damage)
    assert str(run_dir) not in " ".join(problems)
    for part in damage:
        assert any(problem.startswith(part) for problem in problems), part
        assert part in page.text
    assert "Explained variance" in page.text


def test_a_feedback_report_that_cannot_tell(light_run: Path) -> None:
    feedback = json.loads((light_run / "feedback.json").read_text())
    feedback |= {"alpha": None, "leave_one_out": None, "per_judge": [7], "percent": "?"}
    (light_run / "feedback.json").write_text(json.dumps(feedback))
    assert "cannot be told" in page_of(light_run).text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}\u202e\x00\x1b[31m"


def test_what_a_model_wrote_stays_text(run_dir: Path) -> None:
    raw = (run_dir / "evaluation.json").read_text()
    values = json.loads(raw)
    for entry in values["prompts"]:
        entry["prompt"] = HOSTILE
        for response in entry["responses"]:
            response["text"] = HOSTILE + " \ud800"
    values["settings"][HOSTILE] = HOSTILE
    (run_dir / "evaluation.json").write_text(json.dumps(values))
    rows = [{"prompt": HOSTILE, "response": HOSTILE, "score": 1.0, "step": 1}]
    (run_dir / "ppo/samples/step_000001.jsonl").write_text(json.dumps(rows[0]) + "\n")
    line = {"stage": "ppo", "step": 41, "total": 41, f"ppo/{HOSTILE}$x_1$": 1.5}
    with (run_dir / "ppo/metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    feedback = {"summary": HOSTILE, "per_judge": [{"judge": HOSTILE, "judgements": 3}]}
    (run_dir / "feedback.json").write_text(json.dumps(feedback))
    source = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page.text
    assert page.unbalanced == []
    assert "\x00" not in source


def test_names_of_checkpoints_and_of_the_run_are_escaped(light_run: Path) -> None:
    raw = (light_run / "evaluation.json").read_text()
    (light_run / "evaluation.json").write_text(raw.replace('"ppo"', '"<b>模型</b>"'))
    renamed = light_run.rename(light_run.with_name("a <u>run & more"))
    page = page_of(renamed)
    assert "<b>模型</b> raised the share" in page.text
    assert "a <u>run & more" in page.text
    assert f"rlhf report '{renamed}'" in page.text
    assert "u" not in page.tags


def test_chinese_texts_are_marked_as_such(tmp_path: Path) -> None:
    run_dir = write_synthetic_run(tmp_path / "zh", language="zh")
    evaluation = read_evaluation(run_dir)
    page = page_of(run_dir)
    assert "zh-Hans" in page.values("lang")
    assert any(p.prompt.splitlines()[0] in page.text for p in evaluation.prompts)


def test_three_checkpoints_and_no_true_quality(light_run: Path) -> None:
    values = json.loads((light_run / "evaluation.json").read_text())
    first, second = values["checkpoints"]
    values["checkpoints"] = [first, {**second, "name": "middle"}, second]
    values["comparisons"] = [c for c in values["comparisons"] if c["by"] == "reward"]
    for checkpoint in values["checkpoints"]:
        checkpoint |= {"quality": None, "good_share": None, "quality_parts": {}}
    for entry in values["prompts"]:
        middle = {**entry["responses"][0], "checkpoint": "middle"}
        entry["responses"].append(middle)
        for response in entry["responses"]:
            response |= {"quality": None, "good": None, "quality_parts": {}}
    (light_run / "evaluation.json").write_text(json.dumps(values))
    page = page_of(light_run)
    assert "PPO raised the mean reward from" in page.text
    assert "middle" in page.text
    assert "True quality, response by response" not in page.text


def test_a_win_rate_around_one_half_is_called_what_it_is(light_run: Path) -> None:
    evaluation = read_evaluation(light_run)
    write_evaluation(light_run, evaluation)
    values = json.loads((light_run / "evaluation.json").read_text())
    for comparison in values["comparisons"]:
        comparison["win_rate"] |= {"value": 0.52, "low": 0.4, "high": 0.64}
    (light_run / "evaluation.json").write_text(json.dumps(values))
    assert "the interval holds 50%, so chance alone could explain it" in page_of(light_run).text


def test_secrets_do_not_reach_the_page(light_run: Path) -> None:
    with (light_run / "config.yaml").open("a") as file:
        file.write(
            "hub_token: hf_SECRET1\nterm:\n  url: http://x:SECRET2@host/v1?api_key=SECRET3\n"
        )
    source = write_report(light_run).read_text(encoding="utf-8")
    assert "SECRET" not in source
    assert "max_new_tokens: 96" in source
    kept = "max_prompt_tokens: 96\ntokens_per_step: 8192\nurl: http://host:80/v1\n"
    assert without_secrets(kept) == kept


def test_a_stage_the_run_does_not_have_is_not_missed(light_run: Path) -> None:
    text = (light_run / "config.yaml").read_text()
    lines = re.sub(r"(?ms)^pretrain:\n(?:  .*\n)+", "pretrain: null\nmodel: some/model\n", text)
    (light_run / "config.yaml").write_text(lines.replace("\nmodel: null", ""))
    page = page_of(light_run)
    assert "rlhf pretrain" not in page.text
    assert "Base model" not in page.text


def test_words_of_the_prompt_are_found_again() -> None:
    prompt = "Arden fire\nA fire in Arden drove out 24 families."
    assert echoes(prompt, "Police in Arden met 24 families, 2 dogs.") == (
        ("Police in ", False), ("Arden", True), (" met ", False), ("24", True), (" ", False),
        ("families", True), (", 2 dogs.", False),
    )  # fmt: skip
    assert echoes("临江大楼起火，32家人撤离", "大火从临江大楼开始，32家人。") == (
        ("大火从", False), ("临江大楼", True), ("开始，", False), ("32家人", True), ("。", False),
    )  # fmt: skip
    text = "anything at all, 什么都行"
    assert "".join(piece for piece, _ in echoes(prompt, text)) == text


def test_a_short_first_line_is_the_headline() -> None:
    assert headline("Fire in Arden\nIt burns.\n") == ("Fire in Arden", "It burns.")
    assert headline("one line only") == ("", "one line only")
    assert headline("x" * 200 + "\nmore") == ("", "x" * 200 + "\nmore")


def test_numbers_are_short() -> None:
    assert [compact(v) for v in (0, 1234.0, 0.00012, -2.0, 999.6, 0.5, 2.5e6)] == [
        "0", "1.23k", "1.2e-4", "−2", "1k", "0.5", "2.5M",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 99, 264, 7500)] == ["0 s", "99 s", "4 min 24 s", "2 h 5 min"]


def test_smoothing_keeps_lines_and_passes_over_gaps() -> None:
    import numpy as np

    assert smooth(np.full(9, 3.0), 4) == pytest.approx(np.full(9, 3.0))
    ramp = np.arange(30.0)
    assert smooth(ramp, 5)[8:22] == pytest.approx(ramp[8:22])  # centred: no lag
    ramp[15] = np.nan
    assert smooth(ramp, 5)[15] == pytest.approx(15.0)


def test_the_summary_picture(run_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "summary.png"
    plot_quickstart_summary(run_dir, picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 10_000 < picture.stat().st_size < 1_000_000
    (run_dir / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match="rlhf evaluate"):
        plot_quickstart_summary(run_dir, picture)
