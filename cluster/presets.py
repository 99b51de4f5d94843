"""Presets: the few configurations that the command line can start without a file."""

from __future__ import annotations

from pathlib import Path

from actors.config import DataConfig, EngineConfig, NewswireConfig, RolloutConfig, SamplingConfig
from cluster.config import EvaluateConfig, RunConfig
from learner.config import (
    KLConfig,
    LearnersConfig,
    OptimizerConfig,
    PPOConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
)
from reward_service.config import (
    CollectConfig,
    JudgeConfig,
    RewardConfig,
    RewardServiceConfig,
)


def quickstart_config(*, run_dir: Path, language: str = "en", seed: int = 0) -> RunConfig:
    """The whole loop in about ten minutes on two CPU cores, on a generated newswire."""
    return RunConfig(
        run_dir=run_dir,
        seed=seed,
        data=DataConfig(
            newswire=NewswireConfig.model_validate({"language": language, "good_share": 0.2}),
            max_prompt_tokens=96,
        ),
        pretrain=PretrainConfig(
            vocab_size=2048,
            context=256,
            epochs=1.6,
            tokens_per_step=2048,
            tokens_per_micro_batch=2048,
            held_out_share=0.02,
            evaluations=2,
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_share=0.05),
        ),
        sft=SFTConfig(
            epochs=1.0,
            tokens_per_step=2048,
            tokens_per_micro_batch=2048,
            held_out_share=0.02,
            evaluations=1,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_share=0.05),
        ),
        collect=CollectConfig(pairs=2500, judge=JudgeConfig(noise=0.15, shared=0.1)),
        reward_model=RewardModelConfig(
            epochs=1,
            tokens_per_step=2048,
            tokens_per_micro_batch=2048,
            held_out_share=0.1,
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_share=0.05),
        ),
        sampling=SamplingConfig(max_new_tokens=96),
        rollout=RolloutConfig(engine=EngineConfig(threads=2, max_num_seqs=128)),
        reward=RewardConfig(service=RewardServiceConfig(port=0, threads=2)),
        learners=LearnersConfig(num_learners=1, threads=2),
        ppo=PPOConfig(
            steps=24,
            prompts_per_step=64,
            epochs=2,
            minibatches=4,
            kl=KLConfig(coef=0.03),
            policy=OptimizerConfig(learning_rate=2e-4, betas=(0.9, 0.999)),
            critic=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999)),
        ),
        evaluate=EvaluateConfig(prompts=128),
    )
