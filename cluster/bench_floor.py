"""The floor of one PPO iteration: bare vLLM and bare torch, nothing of this project in between.

Run as a process of its own (``python -m cluster.bench_floor``), once for each setting, so that
the benchmark can take the best of them. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS, MINIBATCHES = 4, 4


def generate(model: str, prompts: list[list[int]], new_tokens: int, dtype: str) -> dict[str, Any]:
    """Bare ``LLM.generate`` with log-probabilities, as a rollout needs them."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        TORCH_COMPILE_DISABLE="1",
    )
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        max_num_seqs=len(prompts),
        disable_log_stats=True,
    )
    seconds = []
    for repeat in range(3):
        parameters = [
            SamplingParams(
                temperature=1.0,
                max_tokens=new_tokens,
                logprobs=0,
                detokenize=False,
                flat_logprobs=True,
                seed=1000 * repeat + i,
                stop_token_ids=[2],
            )
            for i in range(len(prompts))
        ]
        started = time.perf_counter()
        outputs = engine.generate(
            [{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False
        )
        seconds.append(time.perf_counter() - started)
    responses = [list(o.outputs[0].token_ids) for o in outputs]
    tokens = sum(map(len, responses))
    return {"seconds": min(seconds), "tokens": tokens, "responses": responses}


def learn(
    model: str,
    prompts: list[list[int]],
    responses: list[list[int]],
    bf16: bool,
) -> dict[str, Any]:
    """Reference, policy and value forwards, then 4 epochs of forward, backward and step."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy = AutoModelForCausalLM.from_pretrained(model).train()
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    critic = AutoModel.from_pretrained(model).train()
    head = torch.nn.Linear(policy.config.hidden_size, 1)
    optimizers = [
        torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True),
        torch.optim.AdamW([*critic.parameters(), *head.parameters()], lr=1e-5, fused=True),
    ]
    width = len(prompts[0])
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    order = np.argsort([len(r) for r in rows], kind="stable")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def batch(members: Any) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(rows[i]) for i in members)
        ids = torch.zeros(len(members), longest, dtype=torch.long)
        mask = torch.zeros(len(members), longest - width, dtype=torch.bool)
        for row, i in enumerate(members):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask[row, : len(rows[i]) - width] = True
        return ids, mask

    def logprobs(network: Any, ids: torch.Tensor) -> Any:
        hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state[:, width - 1 : -1]
        logits = network.lm_head(hidden).float()
        return logits.log_softmax(-1).gather(-1, ids[:, width:, None]).squeeze(-1)

    def values(ids: torch.Tensor) -> Any:
        hidden = critic(input_ids=ids, use_cache=False).last_hidden_state[:, width - 1 : -1]
        return head(hidden).squeeze(-1).float()

    def iteration() -> None:
        old: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for members in np.array_split(order, MINIBATCHES):
            ids, _ = batch(members)
            with torch.no_grad(), autocast:
                before, _, value = logprobs(policy, ids), logprobs(reference, ids), values(ids)
            for row, i in enumerate(members):
                old[i] = (before[row], value[row])
        for _ in range(EPOCHS):
            for members in np.array_split(order, MINIBATCHES):
                ids, mask = batch(members)
                length = mask.shape[1]
                with autocast:
                    new, value = logprobs(policy, ids), values(ids)
                past = torch.stack([_fit(old[i][0], length) for i in members])
                target = torch.stack([_fit(old[i][1], length) for i in members])
                ratio = (new - past).exp()
                surrogate = torch.max(-ratio, -ratio.clamp(0.8, 1.2))
                loss = (surrogate + 0.5 * (value - target - 1).square())[mask].mean()
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()

    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        iteration()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds)}


def _fit(row: Any, length: int) -> Any:
    import torch

    return (
        row[:length] if len(row) >= length else torch.nn.functional.pad(row, (0, length - len(row)))
    )


def main() -> None:
    """``generate|learn REQUEST.json``: the request holds the arguments of the function."""
    what, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = generate(**request) if what == "generate" else learn(**request)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
