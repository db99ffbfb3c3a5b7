"""One configuration for each kind of task, learned from scratch on two CPU cores from some hundred to some thousand
examples: small proofs that a task works, and the start of a table of baselines.

    rag-jax corpus SET/passages.jsonl --out data/SET-corpus --train-tokenizer --passage-words 0 \\
        --encoder-vocab 8192 --generator-vocab 8192 --encoder-length TOKENS --generator-length TOKENS
    rag-jax train --config configs/tasks.py:NAME --run runs/NAME --set corpus=data/SET-corpus \\
        --set train=SET/train.jsonl --set dev=SET/dev.jsonl
    rag-jax evaluate runs/NAME

TOKENS is the task's `tokens` in TASKS below. A run answers as its task needs without further flags: classification
within its labels, long answers with beams. `--set model.variant=token` trains RAG-Token. `python scripts/baselines.py
DATA NAME --out runs/tables` does all of this, and puts every baseline beside the trained model in one table.

    NAME               reads -> writes                             trained on            evaluated on
    squad, nq_gold     question -> answer                          train                 dev
    xquad_zh, _ar, _ru the same in Chinese, Arabic, Russian        train                 dev
    multihop           question over two to four passages          nq_gold's train       test
    jeopardy           an answer of squad -> its question          train                 dev
    squad_qg           a sentence -> a question about it           train                 dev
    pubmedqa_long      question -> conclusion of the abstract      train                 dev
    clapnq             question -> an answer of some sentences     its dev               test
    medquad            question -> beginning of the answer         train                 dev
    cmu_dog            last turns of a dialogue -> the next one    train                 dev
    pubmedqa           question -> yes, no, maybe                  train                 dev
    climate_fever      claim -> one of four verdicts               train                 dev
    fever_symmetric    claim -> SUPPORTS, REFUTES                  its dev               test
    ir_cacm            topic -> a ranking                          the corpus itself     dev

docs/benchmarks.md has what was seen: every kind beside its baselines, with intervals.

multihop and clapnq search nq_gold's passages, too. ir_cacm has no generator: its retriever learns from titles and
sentences of the passages (inverse cloze).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from squad import adam, text_config  # the file beside this one


def stage(name: str, steps: int, batch: int, optimizer: ConfigDict, **values: object) -> ConfigDict:
    config = ConfigDict({"name": name, "steps": steps, "batch": batch, **values})
    config.optimizer = optimizer
    return config


def retriever(steps: int) -> ConfigDict:
    """Stage: contrastive training with in-batch negatives, starting from the corpus' document frequencies."""
    return stage("retriever", steps, 32, adam(3e-4, warmup=10, question_encoder=1.0), objective="contrastive")


def read(steps: int, documents: str = "gold", **values: object) -> ConfigDict:
    """Stage: training of the generator alone, with the gold passage or, with documents="none", without passages."""
    return stage("read", steps, 16, adam(1e-3, generator=1.0), documents=documents, **values)


def joint(steps: int, **values: object) -> ConfigDict:
    """Stage: joint training through the marginal likelihood, on retrieved passages."""
    groups = {"question_encoder": 0.2, "generator": 1.0}
    return stage("joint", steps, 8, adam(5e-4, warmup=10, **groups), refresh=str(max(steps // 2, 1)), **values)


def lengths(c: ConfigDict, question: int, source: int, target: int) -> None:
    """Sets the lengths of question, joined input and target, in tokens."""
    c.model.question_length, c.model.source_length, c.target_length = question, source, target


def answers(c: ConfigDict) -> None:
    """Short answers: the configuration of configs/squad.py, unchanged."""


def language(c: ConfigDict, bm25: str, match: str = "string") -> None:
    """Short answers from 900 questions in another language, with fewer steps.

    bm25: language of BM25's analysis. match: how answers are compared.
    """
    for one in c.stages[:-1]:
        one.steps = int(0.4 * one.steps)
    c.stages = (*c.stages[:-1], joint(60))
    c.task = ConfigDict({"match": match})
    c.search = ConfigDict({"bm25": {"language": bm25}})  # has effect only where BM25 searches


def generation(c: ConfigDict, beams: int = 4) -> None:
    """Answers of some sentences: beam search without repeated trigrams."""
    c.answering = ConfigDict({"num_beams": beams, "no_repeat_ngram_size": 3, "mode": "fast", "batch": 32})
    c.best_metric = "eval/rouge_l"


def long_answers(c: ConfigDict, reading: int, trained: int = 60) -> None:
    """Long answers; reading, trained: steps of the stages read and joint."""
    lengths(c, 40, 240, 64)
    generation(c)
    c.stages = (retriever(100), read(reading), joint(trained))


def dialogue(c: ConfigDict) -> None:
    """The next turn of a dialogue; a long one is truncated at its beginning, since the last turns count."""
    lengths(c, 112, 256, 40)
    generation(c)
    c.model.question_keeps = "end"
    c.stages = (retriever(100), read(600), joint(60))


def questions(c: ConfigDict, reads: str) -> None:
    """Question generation; reads: the field of an example that is read, "answer" or "passage"."""
    generation(c)
    c.task = ConfigDict({"reads": reads, "writes": "question"})
    if reads == "passage":  # the input holds all that is needed; retrieval can only add similar passages
        lengths(c, 64, 160, 32)
        c.stages = (read(1200, documents="none", source_length=72), joint(60))
    else:
        lengths(c, 16, 240, 32)
        c.stages = (retriever(100), read(1000), joint(60))


def labels(c: ConfigDict, classes: tuple[str, ...], reading: int, trained: int, question: int = 48) -> None:
    """Classification: decoding allows only labels, with one beam for each, so all are compared by their probability.

    There is no length penalty and no label smoothing: smoothing costs each token equally, so longer labels would lose.
    classes: the labels. reading, trained: steps of the stages read (0: none) and joint. question: length in tokens.
    """
    lengths(c, question, 200, 16)
    c.task = ConfigDict({"writes": "answer"})
    how = {"allowed_answers": classes, "num_beams": len(classes), "length_penalty": 0.0, "batch": 32}
    c.answering = ConfigDict(how)
    c.best_metric = "eval/accuracy"
    c.stages = (retriever(60), *([read(reading)] if reading else []), joint(trained))


def ranking(c: ConfigDict) -> None:
    """Retrieval alone, with a retriever trained by inverse cloze on the passages; there is no generator."""
    c.train, c.model.generator, c.model.question_length = "", None, 64
    c.answering = ConfigDict({"retrieval_only": True})
    c.best_metric = "eval/ndcg_at_10"
    c.stages = (stage("retriever", 200, 32, adam(3e-4, warmup=10, question_encoder=1.0), objective="inverse_cloze"),)


class Task(NamedTuple):
    """A kind of task on a data set.

    configure, options: the function, and its arguments, that changes the configuration of configs/squad.py.
    train, dev: files of questions, without suffix.
    passages: data sets whose passages are searched.
    metrics: columns of the table of baselines.
    tokens: length of a passage.
    """

    configure: Callable[..., None]
    options: dict[str, Any]
    train: str
    dev: str
    passages: tuple[str, ...]
    metrics: tuple[str, ...]
    tokens: int


def task(
    configure: Callable[..., None],
    metrics: tuple[str, ...],
    data: str,
    train: str = "",
    dev: str = "dev",
    beside: tuple[str, ...] = (),
    tokens: int = 256,
    **options: Any,
) -> Task:
    """A task on the data set `data`.

    train: questions to train on, by default the set's own. dev: split to evaluate on. beside: further data sets whose
    passages are searched. tokens: length of a passage. options: arguments of `configure`.
    """
    return Task(configure, options, train or f"{data}/train", f"{data}/{dev}", (data, *beside), metrics, tokens)


SHORT = ("exact_match", "f1", "recall_at_1", "recall_at_5")
LONG = ("rouge_l", "bleu_1", "bleu", "distinct_2", "recall_at_5")
CLASS = ("accuracy", "macro_f1", "recall_at_1", "recall_at_5")
TOPICS = ("ndcg_at_10", "mrr_at_10", "recall_at_5", "gold_share_at_20")
ALL = ("all_gold_at_5", "all_gold_at_20")
DECIDED = ("SUPPORTS", "REFUTES")
VERDICTS = (*DECIDED, "NOT_ENOUGH_INFO", "DISPUTED")
NQ = ("nq_gold",)

TASKS = {
    "squad": task(answers, SHORT, "squad"),
    "nq_gold": task(answers, SHORT, "nq_gold", tokens=160),
    "multihop": task(answers, (*SHORT, *ALL), "multihop", "nq_gold/train", "test", NQ, tokens=192),
    "xquad_zh": task(language, SHORT, "xquad_zh", bm25="chinese", match="mlqa_zh"),
    "xquad_ar": task(language, SHORT, "xquad_ar", bm25="arabic", match="mlqa_ar"),
    "xquad_ru": task(language, SHORT, "xquad_ru", bm25="russian"),
    "jeopardy": task(questions, LONG, "squad", reads="answer"),
    "squad_qg": task(questions, LONG, "squad_qg", tokens=96, reads="passage"),
    "pubmedqa_long": task(long_answers, LONG, "pubmedqa", reading=400),
    "clapnq": task(long_answers, LONG, "clapnq", "clapnq/dev", "test", NQ, tokens=192, reading=300),
    "medquad": task(long_answers, LONG, "medquad", tokens=192, reading=1000),
    "cmu_dog": task(dialogue, ("f1", *LONG), "cmu_dog", tokens=192),
    "pubmedqa": task(labels, CLASS, "pubmedqa", classes=("yes", "no", "maybe"), reading=200, trained=100),
    "climate_fever": task(
        labels, CLASS, "climate_fever", tokens=96, classes=VERDICTS, reading=0, trained=300, question=64
    ),
    "fever_symmetric": task(
        labels, CLASS, "fever_symmetric", "fever_symmetric/dev", "test", tokens=96, classes=DECIDED, reading=600,
        trained=100,
    ),
    "ir_cacm": task(ranking, TOPICS, "ir_cacm"),
}  # fmt: skip


def get_config(name: str = "climate_fever") -> ConfigDict:
    """name: a key of TASKS."""
    if name not in TASKS:
        raise ValueError(f"{name!r} is no task; there are {', '.join(TASKS)}")
    chosen = TASKS[name]
    c = text_config(name, "sequence")
    c.corpus = f"data/{'+'.join(chosen.passages)}-corpus"
    c.train, c.dev = f"data/{chosen.train}.jsonl", f"data/{chosen.dev}.jsonl"
    chosen.configure(c, **chosen.options)
    if "nq_gold" in chosen.passages:
        c.stages[-1].refresh = ""  # embedding so many passages takes longer than these steps
    return c
