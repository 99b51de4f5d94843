"""``rlhf generate``: texts from a model, as JSON lines."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.config import DataConfig, EngineConfig, RolloutConfig, SamplingConfig
from actors.datasets import RawPrompt, load_prompts
from actors.trajectory import Message, SampleFailure, Trajectory
from cluster.config import RunConfig, load_config
from cluster.data import RunData
from cluster.progress import Reporter
from cluster.stop import Stopped, StopRequest
from cluster.text_statistics import distinct_n


def generate_texts(
    *,
    model: Path | None,
    run_dir: Path | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    limit: int | None,
    max_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    chat: bool,
    dtype: str,
) -> None:
    """Print one JSON object a sample, in the order of the prompts.

    Raises:
        FileNotFoundError: The model or the file of prompts is not there.
        ValueError: No prompt at all, or one that is longer than the context.
    """
    if model is None:
        if run_dir is None:
            raise ValueError("no model: give --model DIR, or --run RUN_DIR for a run's policy")
        model = run_dir / "ppo" / "final"
    if not (model / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {model}: give a Hugging Face directory (one with config.json)"
        )
    data = DataConfig(chat_template=chat, max_prompt_tokens=1_000_000, limit=limit)
    raw = [_raw_prompt(i, text, chat) for i, text in enumerate(prompts)]
    if prompts_file is not None:
        raw += load_prompts(str(prompts_file), data)
    if run_dir is not None:
        config = load_config(run_dir / "config.yaml")
        # Put through the chat template as the run does.
        data = data.model_copy(update={"chat_template": config.data.chat_template})
        raw += RunData(config).held_out_prompts()[:limit]
    if not raw:
        raise ValueError(
            "nothing to write about: give --prompt TEXT, --prompts FILE or --run RUN_DIR"
        )
    config = RunConfig(
        run_dir=model,
        model=str(model),
        seed=seed,
        data=data,
        sampling=SamplingConfig(
            max_new_tokens=max_tokens, temperature=temperature, samples_per_prompt=samples
        ),
        rollout=RolloutConfig(engine=EngineConfig.model_validate({"dtype": dtype})),
    )
    reporter = Reporter()
    reporter.say("starting vLLM")
    # Only now: what is wrong with the arguments is said without waiting for these.
    from transformers import AutoTokenizer

    from actors.prompts import tokenize_prompts
    from cluster.session import Session

    stop = StopRequest(reporter.say)
    written = []
    with Session(config, reporter, stop) as session:
        tokenized = tokenize_prompts(raw, AutoTokenizer.from_pretrained(model), data)
        pool = session.rollouts(model)
        answers: list[Trajectory | SampleFailure] = []
        with reporter.bar("generate") as bar:
            for item in pool.generate(tokenized, config.sampling, run_seed=seed, round_index=0):
                answers.append(item)
                bar.update(len(answers), len(tokenized) * samples, {})
                if stop():
                    raise Stopped("no text was written")
        order = {prompt.prompt_id: i for i, prompt in enumerate(tokenized)}
        answers.sort(key=lambda item: (order[item.prompt.prompt_id], item.sample_index))
        for item in answers:
            if isinstance(item, SampleFailure):
                reporter.warn(f"{item.sample_id}: {item.reason}")
                continue
            written.append(item)
            print(json.dumps(_row(item), ensure_ascii=False))
    sys.stdout.flush()
    if not written:
        raise RuntimeError("every sample failed; see the warnings above")
    reporter.say(_summary(written))


def _raw_prompt(index: int, text: str, chat: bool) -> RawPrompt:
    messages = (Message(role="user", content=text),) if chat else ()
    return RawPrompt(prompt_id=f"prompt:{index}", text="" if chat else text, messages=messages)


def _row(trajectory: Trajectory) -> dict[str, object]:
    return {
        "prompt_id": trajectory.prompt.prompt_id,
        "sample": trajectory.sample_index,
        "prompt": trajectory.prompt.text,
        "response": trajectory.response_text,
        "tokens": len(trajectory.response_ids),
        "characters": len(trajectory.response_text),
        "token_id_std": round(float(trajectory.response_ids.std()), 2),
        "finish_reason": trajectory.finish_reason,
        "seed": trajectory.seed,
    }


def _summary(written: Sequence[Trajectory]) -> str:
    texts = [t.response_text for t in written]
    characters = statistics.fmean(len(text) for text in texts)
    tokens = statistics.fmean(len(t.response_ids) for t in written)
    spread = statistics.fmean(float(t.response_ids.std()) for t in written)
    return (
        f"{len(texts)} texts: {tokens:.1f} tokens and {characters:.0f} characters on average, "
        f"token-id standard deviation {spread:.1f}, distinct-1 {distinct_n(texts, 1):.3f}, "
        f"distinct-2 {distinct_n(texts, 2):.3f}"
    )
