"""Pre-training: the tokenizer, documents as rows, and a directory that others load."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.config import OptimizerConfig, PretrainConfig
from learner.pretrain import (
    DocumentLoss,
    PretrainReport,
    cut_documents,
    encode_documents,
    pretrain,
)
from learner.stage import REPORT_FILE, split
from learner.supervised import Interrupted
from learner.tokenizer import CHAT_TEMPLATES, train_tokenizer
from learner.training_state import STATE_FILE

WORDS = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor", "12", "27"]
CHINESE = ["暴雨", "淹没", "十二户", "人家", "市长", "说", "明天", "道路", "恢复", "通车"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def texts(words: list[str], joiner: str, count: int = 300) -> list[str]:
    """Texts in which every word decides the next one, so a model can learn them."""
    rng = np.random.default_rng(0)
    return [
        joiner.join(words[(start + i) % 10] for i in range(length))
        for start, length in rng.integers([0, 5], [10, 20], (count, 2))
    ]


def tiny(**values: object) -> PretrainConfig:
    shape = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "intermediate_size": 64}
    loop = {"context": 64, "tokens_per_step": 512, "tokens_per_micro_batch": 512, "threads": 1}
    optimizer = OptimizerConfig(learning_rate=1e-2)
    return PretrainConfig.model_validate({**shape, **loop, "optimizer": optimizer, **values})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretrainReport]:
    directory = tmp_path_factory.mktemp("base")
    report = pretrain(tiny(epochs=6), texts(WORDS, " "), directory, seed=0, chat_template=CHATML)
    return directory, report


@pytest.mark.parametrize(("words", "joiner"), [(WORDS, " "), (CHINESE, "")])
def test_tokenizer_keeps_every_text(words: list[str], joiner: str, tmp_path: Path) -> None:
    corpus = texts(words, joiner)
    train_tokenizer(corpus, 400, context=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    others = [" two  spaces , and\ttabs\n", "naïve café — 暴雨 🌧", "It 's 7 : 05 .", ""]
    for text in [*corpus[:5], *others]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # Whole words were learnt.
    assert len(tokenizer(corpus[0])["input_ids"]) < 0.6 * len(corpus[0].encode())
    assert tokenizer.model_max_length == 64
    assert tokenizer.clean_up_tokenization_spaces is False
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3


def test_a_small_vocabulary_still_has_every_byte() -> None:
    tokenizer = train_tokenizer(["ab"], 10, context=8)
    assert tokenizer.decode(tokenizer("é\x00z")["input_ids"], skip_special_tokens=True) == "é\x00z"


def test_markers_of_the_chat_template_are_single_tokens() -> None:
    tokenizer = train_tokenizer(texts(WORDS, " "), 320, context=64, chat_template=CHATML)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "rain"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|start|>user\nrain<|end|>\n<|start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|start|>")
    assert len(tokenizer("<|end|>", add_special_tokens=False)["input_ids"]) == 1


def test_chatml_turns_end_with_eos() -> None:
    template = CHAT_TEMPLATES["chatml"]
    tokenizer = train_tokenizer(texts(WORDS, " "), 320, context=64, chat_template=template)
    turns = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "bank"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith(f"bank{tokenizer.eos_token}\n")
    assert len(set(tokenizer.all_special_ids)) == 3  # pad, BOS, EOS; <|im_start|> has no role


def test_documents_are_cut_so_that_every_token_is_predicted_once() -> None:
    document = np.arange(10, dtype=np.int32)
    rows = cut_documents([document], context=4)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    predicted = [token for row in rows for token in row[1:].tolist()]
    assert predicted == list(range(1, 10))
    assert [row.tolist() for row in cut_documents([document[:4]], context=4)] == [[0, 1, 2, 3]]
    assert [row.tolist() for row in cut_documents([document[:5]], 4)] == [[0, 1, 2, 3], [3, 4]]


def test_split_is_disjoint_and_complete() -> None:
    held, kept = split(10, 0.25, seed=3)
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(10))
    assert len(held) == 2
    assert split(2, 0.01, 0)[0].size == split(2, 0.99, 0)[1].size == 1


def test_the_loss_is_that_of_each_document_alone(tiny_llama: Path) -> None:
    """Against transformers' own loss, a document at a time: no leak, no pad, every token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    documents = encode_documents(tokenizer, ["storm rain", "bank", "river mayor council 12 27"])
    assert all(d[-1] == tokenizer.eos_token_id for d in documents)
    objective = DocumentLoss(documents)
    with torch.no_grad():
        loss, _ = objective.loss(model, np.arange(3))
        alone = 0.0
        for document in documents:
            ids = torch.from_numpy(document.astype(np.int64))[None]
            alone += float(model(input_ids=ids, labels=ids).loss) * (len(document) - 1)
    assert objective.weight(np.arange(3)) == sum(len(d) - 1 for d in documents)
    assert loss.item() == pytest.approx(alone, rel=1e-5)


def test_it_learns_what_follows(trained: tuple[Path, PretrainReport]) -> None:
    _, report = trained
    # Texts are decided by their first word and their length; guessing would cost ln(320) = 5.8.
    assert report.held_out_nll < 0.7
    assert report.training.padding_share < 0.1
    assert report.documents == 285
    assert report.held_out_documents == 15


def test_the_directory_is_a_plain_hugging_face_model(trained: tuple[Path, PretrainReport]) -> None:
    directory, report = trained
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(tokenizer) <= model.config.vocab_size == report.vocabulary
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template == CHATML
    assert not (directory / STATE_FILE).exists()
    assert not list(directory.glob("*.bin"))
    saved = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    assert saved["held_out_nll"] == report.held_out_nll
    ids = tokenizer("storm Riverton", return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=2)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("storm Riverton council")


VLLM_LOGPROBS = """
import json, sys
from pathlib import Path
from actors.config import EngineConfig
from actors.engine import VLLMEngine

directory, eos, sequence = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
engine = VLLMEngine(directory, EngineConfig(kv_cache_gib=0.1), eos_token_ids=[eos])
[found] = engine.logprobs([sequence])
engine.shutdown()
print("logprobs", json.dumps(found.tolist()))
"""


def test_the_directory_loads_in_vllm_and_gives_the_same_logprobs(
    trained: tuple[Path, PretrainReport],
) -> None:
    """In a process of its own: an engine binds threads and takes over torch.set_num_threads."""
    directory, _ = trained
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sequence = tokenizer("storm Riverton council market rain")["input_ids"]
    arguments = [str(directory), json.dumps(tokenizer.eos_token_id), json.dumps(sequence)]
    done = subprocess.run(
        [sys.executable, "-c", VLLM_LOGPROBS, *arguments],
        capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("logprobs "))
    found = np.array(json.loads(line.removeprefix("logprobs ")))
    ids = torch.tensor([sequence])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    expected = expected.gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_interrupted_pretraining_ends_with_the_same_model(tmp_path: Path) -> None:
    corpus = texts(WORDS, " ", 80)
    pretrain(tiny(), corpus, tmp_path / "whole", seed=1)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        pretrain(tiny(), corpus, tmp_path / "parts", seed=1, should_stop=lambda: next(asked))
    assert not (tmp_path / "parts" / REPORT_FILE).exists()
    pretrain(tiny(), corpus, tmp_path / "parts", seed=1, resume=True)
    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    corpus = texts(WORDS, " ", 20)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tiny(), corpus, tmp_path / name, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        weights.append(model.model.embed_tokens.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_existing_model_keeps_its_tokenizer(
    trained: tuple[Path, PretrainReport], tmp_path: Path
) -> None:
    base, first = trained
    report = pretrain(
        tiny(init_from=str(base), epochs=1), texts(WORDS, " "), tmp_path / "more", seed=0
    )
    old, new = (AutoTokenizer.from_pretrained(d) for d in (base, tmp_path / "more"))
    assert old.get_vocab() == new.get_vocab()
    assert new.chat_template == CHATML
    assert report.held_out_nll < first.held_out_nll + 0.2


def test_real_model(shared_data: Path, tmp_path: Path) -> None:
    """The published 260 k parameter model goes on where it was: 1.39 nats a token on stories."""
    import gzip

    path = shared_data / "story_tinystories_slice" / "test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        stories = [json.loads(line)["text"] for line in itertools.islice(file, 60)]
    report = pretrain(
        tiny(init_from=str(shared_data / "model_stories260k"), epochs=0.1, held_out_share=0.5,
             tokens_per_micro_batch=4096, optimizer=OptimizerConfig(learning_rate=1e-5)),
        stories, tmp_path / "stories", seed=0,
    )  # fmt: skip
    assert 1.2 < report.held_out_nll < 1.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stories")
    assert set(model.generation_config.eos_token_id) == {1, 2}
    assert model.generation_config.pad_token_id == 2


@pytest.mark.parametrize("corpus", [[], ["one text"], ["", "  ", "\n"]])
def test_an_empty_corpus_is_refused(corpus: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 are needed"):
        pretrain(tiny(), corpus, tmp_path, seed=0)


def test_a_wrong_start_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    corpus = texts(WORDS, " ", 10)
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        pretrain(tiny(init_from=str(tmp_path / "nothing")), corpus, tmp_path / "out", seed=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no config.json \(found: notes.txt\)"):
        pretrain(tiny(init_from=str(tmp_path / "empty")), corpus, tmp_path / "out", seed=0)


def test_loss_is_finite_or_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training diverged"):
        pretrain(
            tiny(epochs=20, optimizer=OptimizerConfig(learning_rate=1e30)),
            texts(WORDS, " ", 80), tmp_path, seed=0,
        )  # fmt: skip


def test_uniform_guessing_is_where_it_starts(tmp_path: Path) -> None:
    losses: list[float] = []
    report = pretrain(
        tiny(optimizer=OptimizerConfig(learning_rate=0.0)), texts(WORDS, " ", 40), tmp_path,
        seed=0, on_step=lambda s, t, m: losses.append(m["loss"]),
    )  # fmt: skip
    # Not exactly: the initial attention favours what the context has already said.
    assert losses[0] == pytest.approx(math.log(report.vocabulary), abs=0.5)
