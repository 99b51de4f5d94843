"""Configuration of rewards, the reward service and simulated judges. No torch or Ray here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from actors.config import StrictConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of a served model: it appears in URLs, metrics and Serve's deployments."""

Combination = Literal["mean", "minimum", "lower_bound"]

WireFormat = Literal["native", "openrlhf", "slime", "vllm", "vllm_score", "sglang"]


class RewardTerm(StrictConfig):
    """One term of the reward: exactly one of ``model``, ``models``, ``url`` and ``function``."""

    name: str = Field(description="appears in metrics as reward/<name>")
    weight: float = 1.0
    model: str | None = Field(None, description="reward-model directory, served by Ray Serve")
    models: tuple[str, ...] | None = Field(
        None, min_length=2, description="several such directories, which answer as one"
    )
    combine: Combination = Field(
        "lower_bound",
        description="of models: mean; minimum; lower_bound: mean - penalty x standard deviation",
    )
    penalty: float = Field(1.0, ge=0, description="of lower_bound, in standard deviations")
    url: str | None = Field(
        None, description="a reward server: its root, or the endpoint for openrlhf and slime"
    )
    format: WireFormat = Field("native", description="what the server at the url speaks")
    served_model: str | None = Field(None, description="which of the models at the url")
    token_env: str | None = Field(
        None, description="environment variable that holds the token for the url"
    )
    function: str | None = Field(None, description="package.module:function in Python")

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardTerm:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"reward term name {self.name!r} must be letters, digits, '_', '.' or '-': it "
                "names the served model and its metrics"
            )
        kinds = ("model", "models", "url", "function")
        given = [k for k in kinds if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"reward term {self.name!r} needs exactly one of model, models, url and function, "
                f"got {given or 'none'}"
            )
        if self.url is not None and "@" in self.url.partition("://")[2].partition("/")[0]:
            # The configuration is written into the run directory.
            raise ValueError(
                f"reward term {self.name!r} has a secret in its url: put the token into an "
                "environment variable and name that in token_env"
            )
        return self

    @property
    def members(self) -> dict[str, str]:
        """Directories that the service serves for this term, by the name they get there."""
        if self.models is not None:
            return {f"{self.name}.{i}": path for i, path in enumerate(self.models)}
        return {} if self.model is None else {self.name: self.model}


class AutoscalingConfig(StrictConfig):
    """Replicas by the length of the queue. Delays are Serve's own defaults."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: float = Field(
        8.0, gt=0, description="requests under way and waiting that a replica should have"
    )
    upscale_delay_s: float = Field(30.0, ge=0, description="how long the queue must be long")
    downscale_delay_s: float = Field(600.0, ge=0, description="how long it must be short")
    look_back_s: float = Field(30.0, gt=0, description="window over which requests are averaged")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"autoscaling.min_replicas {self.min_replicas} is more than max_replicas "
                f"{self.max_replicas}"
            )
        return self


class EnsembleConfig(StrictConfig):
    """Several reward models that answer as one, so that no single one's mistakes are paid for."""

    members: tuple[str, ...] = Field(min_length=2, description="names of served models")
    combine: Combination = Field(
        "lower_bound",
        description="mean; minimum; lower_bound: mean - penalty x standard deviation over members",
    )
    penalty: float = Field(
        1.0, ge=0, description="of lower_bound, in standard deviations (arXiv 2310.02743)"
    )

    @model_validator(mode="after")
    def _members_differ(self) -> EnsembleConfig:
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"an ensemble's members must differ, got {list(self.members)}")
        return self


class RewardServiceConfig(StrictConfig):
    """The Ray Serve application."""

    host: str = Field("127.0.0.1", description="anything but loopback needs tokens")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free port")
    tokens_file: Path | None = Field(
        None,
        description="file with a token a line, of which every request must carry one; tokens in"
        " the environment (RLHF_REWARD_TOKENS) count too",
    )
    models_root: Path | None = Field(
        None, description="PUT /v1/models/NAME may load directories inside it; default: none"
    )
    log_texts: bool = Field(False, description="write what is scored into the replica's log")
    ensembles: dict[str, EnsembleConfig] = Field(
        default_factory=dict, description="further models made of served ones, by name"
    )
    num_replicas: int = Field(1, ge=1, description="replicas of each model")
    ingress_replicas: int = Field(
        1, ge=1, description="HTTP processes; with 2 one can die without an outage"
    )
    autoscaling: AutoscalingConfig | None = Field(
        None, description="replicas by the length of the queue instead of num_replicas"
    )
    num_cpus_per_replica: float = Field(0.5, ge=0)
    num_gpus_per_replica: float = Field(0.0, ge=0)
    resources_per_replica: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources of nodes for reward models, as {rlhf_reward: 1}",
    )
    threads: int = Field(1, ge=1, description="CPU threads of a replica")
    token_budget: int = Field(8192, ge=1, description="padded tokens in one forward pass")
    batch_wait_s: float = Field(
        0.0,
        ge=0,
        description="how long a replica with nothing else to do lets a batch fill; without, it"
        " begins at once, and what comes meanwhile is the next batch",
    )
    one_by_one: bool | None = Field(
        None,
        description="a forward pass for each sample, so that a score is the same bit for bit"
        " whatever is scored beside it; default: on a CPU yes, on a GPU no",
    )
    max_items: int = Field(512, ge=1, description="items in one request")
    max_chars: int = Field(200_000, ge=1, description="characters in one item")
    max_tokens: int = Field(32_768, ge=1, description="tokens in one item, the context permitting")
    max_body_bytes: int = Field(16 << 20, ge=1024, description="bytes in one request")
    max_ongoing_requests: int = Field(256, ge=1, description="that a replica holds at once")
    max_queued_requests: int = Field(
        256,
        ge=1,
        description="that wait for a replica; an HTTP process that holds as many as both together"
        " answers further ones with a 503. Reloads, probes and metrics have room beyond it",
    )
    start_timeout_s: float = Field(300.0, gt=0, description="every model must be loaded by then")
    timeout_s: float = Field(120.0, gt=0, description="deadline of one request, retries included")
    max_retries: int = Field(5, ge=0, description="when a replica dies under a request")
    reload_timeout_s: float = Field(120.0, gt=0, description="a new version must be loaded by then")
    shutdown_timeout_s: float = Field(
        30.0,
        ge=0,
        description="how long a replica that is taken down may finish what it has; more than a"
        " model takes to load",
    )
    idempotency_seconds: float = Field(
        600.0, ge=0, description="how long an answer to a request with a key is remembered"
    )
    idempotency_entries: int = Field(10_000, ge=1, description="answers remembered at most")

    @property
    def most_requests(self) -> int:
        """Requests for scores that one HTTP process holds at once."""
        return self.max_ongoing_requests + self.max_queued_requests

    @property
    def replica_resources(self) -> dict[str, float]:
        """What one replica asks of Ray."""
        given = {"CPU": self.num_cpus_per_replica, "GPU": self.num_gpus_per_replica}
        return given | self.resources_per_replica

    @property
    def most_replicas(self) -> int:
        """Replicas of each model when all are up."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas


class ServeApplicationConfig(StrictConfig):
    """``args`` of the application in a ``serve deploy`` file."""

    models: dict[str, Path] = Field(min_length=1, description="name: reward-model directory")
    service: RewardServiceConfig = RewardServiceConfig()


def check_names(models: Mapping[str, object], config: RewardServiceConfig) -> None:
    """Raises ValueError for a bad name, a name used twice, or an ensemble of unknown models."""
    for name in [*models, *config.ensembles]:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"model name {name!r} must be letters, digits, '_', '.' or '-': it is part of URLs"
            )
    for name, ensemble in config.ensembles.items():
        if name in models:
            raise ValueError(f"a model and an ensemble are both called {name!r}")
        unknown = sorted(set(ensemble.members) - set(models))
        if unknown:
            raise ValueError(
                f"the ensemble {name!r} has members that are not served: {unknown}; served: "
                f"{sorted(models)}"
            )


class RetryConfig(StrictConfig):
    """How often scoring is tried again before a sample, or the run, is given up.

    Pauses double with each try. Other samples are scored meanwhile.
    """

    max_retries: int = Field(2, ge=0, description="of a sample that could not be scored")
    pause_s: float = Field(0.25, ge=0, description="before the first further try")
    max_pause_s: float = Field(30.0, gt=0)
    unreachable_s: float = Field(
        300.0, ge=0, description="how long a reward server that cannot be reached is tried again"
    )

    def pause(self, tries: int) -> float:
        """Seconds to wait after ``tries`` (>= 1) tries that failed."""
        return min(self.max_pause_s, self.pause_s * 2.0 ** min(tries - 1, 60))


class RewardConfig(StrictConfig):
    """What PPO maximises: a weighted sum of terms."""

    terms: tuple[RewardTerm, ...] = ()
    retry: RetryConfig = RetryConfig()
    service: RewardServiceConfig = RewardServiceConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> RewardConfig:
        names = [term.name for term in self.terms]
        members = [name for term in self.terms if term.models for name in term.members]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two reward terms are called {name!r}: each needs its own name")
            if name in members:
                raise ValueError(
                    f"a reward term and a member of an ensemble are both called {name!r}: rename "
                    "the term"
                )
        return self


class JudgeConfig(StrictConfig):
    """Simulated judges. Each draws its own noise and biases around these."""

    judges: int = Field(5, ge=1)
    judgements_per_pair: int = Field(3, ge=1, description="how many judges see a shared pair")
    shared: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of pairs that several judges see, to measure their agreement; the"
        " others get one judgement each, which teaches a reward model more for the same effort",
    )
    noise: float = Field(0.15, ge=0, description="standard deviation added to true quality")
    position_bias: float = Field(
        0.03, ge=0, description="spread of the favour for what is shown first, in units of quality"
    )
    length_bias: float = Field(0.03, ge=0, description="spread of the favour per doubled length")
    tie_margin: float = Field(0.05, ge=0, description="differences below it are called a tie")
    both_bad_below: float = Field(
        0.2, description="of two that tie, both perceived below it are called both bad"
    )

    @model_validator(mode="after")
    def _enough_judges(self) -> JudgeConfig:
        if self.judgements_per_pair > self.judges:
            raise ValueError(
                f"judgements_per_pair is {self.judgements_per_pair} but there are only "
                f"{self.judges} judges"
            )
        return self


class PrivacyConfig(StrictConfig):
    """What finds personal data in texts, so that it is masked before they are stored."""

    scanner: Literal["patterns", "presidio"] = Field(
        "patterns",
        description="patterns: our own, by form and check digits; presidio: its recognisers"
        " besides (pip install ray-rlhf[privacy])",
    )
    entities: tuple[str, ...] = Field(
        ("CRYPTO", "MEDICAL_LICENSE", "PHONE_NUMBER", "UK_NHS", "US_ITIN", "US_SSN"),
        min_length=1,
        description="what presidio looks for, by its names; PERSON, LOCATION and ORGANIZATION"
        " need a spacy_pipeline",
    )
    threshold: float = Field(
        0.4, ge=0, le=1, description="presidio's score from which a finding is masked"
    )
    spacy_pipeline: str | None = Field(
        None, description="an installed spaCy pipeline (en_core_web_lg) or a directory of one"
    )

    @model_validator(mode="after")
    def _stays_offline(self) -> PrivacyConfig:
        # Presidio's recognisers of these fetch a list of domains from the internet.
        if {"EMAIL_ADDRESS", "URL"} & set(self.entities):
            raise ValueError(
                "privacy.entities: leave out EMAIL_ADDRESS, which the patterns find, and URL, "
                "which is not personal by itself"
            )
        named = {"PERSON", "LOCATION", "ORGANIZATION", "NRP"} & set(self.entities)
        if named and self.spacy_pipeline is None:
            raise ValueError(
                f"privacy.entities {', '.join(sorted(named))} need privacy.spacy_pipeline: no "
                "pattern could know a name"
            )
        return self


class PeopleConfig(StrictConfig):
    """Judgement by people in a browser."""

    task: Literal["comparison", "rating", "ranking"] = Field(
        "comparison",
        description="two samples to compare, one to rate, or `candidates` to put in order",
    )
    candidates: int = Field(4, ge=3, le=9, description="samples of a ranking; one key for each")
    overlap: int = Field(2, ge=1, description="people who judge each item")
    criteria: tuple[str, ...] = Field(
        ("quality", "diversity"), min_length=1, description="rated 1 to 5, each by itself"
    )
    lease_minutes: float = Field(
        20.0, gt=0, description="an item that is not answered by then goes to somebody else"
    )
    repeat_share: float = Field(
        0.05, ge=0, le=0.5, description="share of items shown to the same person a second time"
    )
    repeat_gap: int = Field(
        15, ge=1, description="items in between the two, so that people judge and not remember"
    )
    gold_share: float = Field(
        0.05, ge=0, le=0.5, description="share of items with a known answer, where there are any"
    )
    flags_to_withhold: int = Field(
        2, ge=1, description="people who flag an item before nobody sees it any more"
    )
    instructions: str | None = Field(
        None, description="text file shown before the first item; default: a page of our own"
    )
    consent: str | None = Field(
        None, description="text file that people agree to before they begin; default: our own"
    )
    privacy: PrivacyConfig = PrivacyConfig()
    retention_days: int = Field(
        365, ge=1, description="judgements of people, and their accounts, are deleted after it"
    )
    invite_days: float = Field(30.0, gt=0, description="how long an invitation signs in")
    session_hours: float = Field(12.0, gt=0, description="then people sign in again")
    host: str = Field("127.0.0.1", description="loopback unless told otherwise")
    port: int = Field(8700, ge=0, le=65535, description="0 picks a free port")
    public_url: str | None = Field(
        None, description="address that people open, where a proxy stands before the page"
    )
    enough: float = Field(
        1.0, gt=0, le=1, description="share of the wanted answers that ends the wait for people"
    )
    wait_hours: float = Field(
        168.0, gt=0, description="`rlhf collect` waits so long for people; then --resume"
    )


class CollectConfig(StrictConfig):
    """The collection of judgements on candidates written by the rollout actors."""

    pairs: int = Field(600, ge=1, description="pairs of candidates to have judged")
    temperature: float = Field(1.0, gt=0)
    source: Literal["simulated", "people", "demonstrations", "preferences"] = Field(
        "simulated",
        description="simulated: judges compare two samples; people: the same in a browser, see"
        " `rlhf collect --serve`; demonstrations: the real response is preferred to a sample and"
        " to another prompt's response; preferences: the pairs of data.preferences as they are",
    )
    round: int = Field(0, ge=0, description="of `rlhf loop`, which sets it; part of item ids")
    opponents: dict[str, str] = Field(
        {},
        description="name -> model directory: half of the pairs set a sample of the policy against"
        " one of these, in turn; `rlhf loop` names the policies of earlier rounds",
    )
    store: str | None = Field(
        None,
        description="file or SQLAlchemy URL of the judgements; default: feedback.sqlite in run_dir",
    )
    least_sure_of: tuple[str, ...] = Field(
        (),
        description="reward-model directories: pairs about which they are least sure are judged"
        " first (and, of `candidate_factor` times as many, kept)",
    )
    candidate_factor: float = Field(
        3.0, ge=1, description="pairs to choose from for each that is judged, with least_sure_of"
    )
    quality: str | None = Field(
        None,
        description="what simulated judges judge by, package.module:function called as"
        " f(prompt=..., response=..., meta=...); default: the newswire's true quality",
    )
    judge: JudgeConfig = JudgeConfig()
    people: PeopleConfig = PeopleConfig()
