"""Two judges without a language model: kept meaning or kept words, each held back by gates that an attack does not pass.

``gated``: the cosine of static word embeddings of intent and prompt. ``coverage``: the share of the intent's content words that
the prompt holds, inflections included. Both end at the level of good prompts, so that nothing is gained by coming closer to
an echo. Each gate, 0 to 1, compares the prompt with the gold prompts of its task:

- *novelty*: enough of its words are not the intent's, and enough content words are new;
- *repetition*: no word pair and no content word comes again;
- *fluency*: word order, by a classifier of word-class n-grams (function words and endings), trained on gold prompts against
  shuffled ones; not for lists of keywords;
- *task*: the task's manner, by a classifier of words, trained on the gold prompts of all tasks.

Nothing of a run is used to fit them, so neither the teacher nor the student has made them. On the gold set itself the
classifiers are those that did not see the pair's half of the set.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from udrl import models
from udrl.evaluate.judges.controls import Pair, gold_pairs, is_prose
from udrl.hashing import stable_id
from udrl.intents.content_words import FUNCTION_WORDS, content_words, coverage
from udrl.scoring.rewards import novelty, repetition
from udrl.tasks import shipped_tasks
from udrl.text import words

TOKENIZER = "../tokenizers/l2_supercat_tokenizer_config.json"  # of wordllama, next to the folder of its weights
WEIGHTS = "l2_supercat_256.safetensors"
VERSION = 1  # bump this when the code changes a score; scores are then computed again
SHUFFLES = 2  # shuffled prompts for each gold prompt, in the training of the fluency gate
ENDINGS = ("ing", "ed", "ly", "ness", "tion", "ous", "ful", "est", "er", "al", "y", "s")

Relevance = Callable[[Sequence[Pair]], np.ndarray]  # pairs -> relevance, not negative, (pairs,)


class Level(NamedTuple):
    """Quantiles of the gold prompts of a task, and whether most of them are prose."""

    relevance: float
    novelty: float
    new_words: float
    distinct: float
    prose: bool


class Classifiers(NamedTuple):
    """Of one half of the gold set."""

    fluency: Any
    task: Any


class GatedJudge:
    """Relevance up to the level of gold prompts, times the gates."""

    def __init__(self, relevance: Relevance) -> None:
        self.relevance = relevance
        self._levels: dict[str, Level] = {}

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return scores of 0 to 1, (pairs,). Pairs of a task without gold are held to the mean level of the shipped tasks."""
        if not pairs:
            return np.zeros(0)
        levels = [self._level(pair.task) for pair in pairs]
        relevance = np.minimum(1.0, self.relevance(pairs) / [level.relevance for level in levels])
        return relevance * self._gates(pairs, levels)

    def _level(self, task: str) -> Level:
        if task not in self._levels:
            pairs = gold_pairs(task)
            if pairs:
                self._levels[task] = self._measure(pairs)
            else:
                shipped = np.array([self._level(name) for name in shipped_tasks() if gold_pairs(name)], dtype=float)
                relevance, novel, new_words, distinct, prose = shipped.mean(axis=0).tolist()
                self._levels[task] = Level(relevance, novel, new_words, distinct, prose > 0.5)
        return self._levels[task]

    def _measure(self, pairs: Sequence[Pair]) -> Level:
        return Level(
            relevance=float(np.quantile(self.relevance(pairs), 0.75)),
            novelty=float(np.quantile([novelty(pair.intent, pair.prompt) for pair in pairs], 0.1)),
            new_words=float(np.quantile([count_new_words(pair) for pair in pairs], 0.1)),
            distinct=float(np.quantile([share_of_distinct(pair.prompt) for pair in pairs], 0.1)),
            prose=is_prose([pair.prompt for pair in pairs]),
        )

    def _gates(self, pairs: Sequence[Pair], levels: Sequence[Level]) -> np.ndarray:
        gates = np.ones((4, len(pairs)))
        for i, (pair, level) in enumerate(zip(pairs, levels, strict=True)):
            gates[0, i] = min(1.0, novelty(pair.intent, pair.prompt) / level.novelty) ** 2
            gates[1, i] = min(1.0, count_new_words(pair) / level.new_words)
            gates[2, i] = min(1.0, share_of_distinct(pair.prompt) / level.distinct) ** 2
        fluency, own_task = _classify(pairs)
        gates[3] = np.where([level.prose for level in levels], np.minimum(1.0, 2 * fluency), 1.0)
        return gates.prod(axis=0) * np.minimum(1.0, 2 * own_task)


def embedding_relevance(model: str) -> Relevance:
    """Return the cosine of the mean static embeddings of intent and prompt, at least 0.

    ``model`` is a folder like wordllama's ``weights`` (bundled:wordllama): one row per token of a tokenizer next to it.
    """
    import os

    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = models.resolve(model)
    (table,) = load_file(os.path.join(folder, WEIGHTS)).values()
    tokenizer = Tokenizer.from_file(os.path.join(folder, TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), table.shape[1]), dtype=np.float32)
        for i, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if encoding.ids:
                vectors[i] = table[encoding.ids].astype(np.float32).mean(axis=0)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    def relevance(pairs: Sequence[Pair]) -> np.ndarray:
        intents, prompts = embed([pair.intent for pair in pairs]), embed([pair.prompt for pair in pairs])
        return np.maximum(0.0, (intents * prompts).sum(axis=1))

    return relevance


def coverage_relevance(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the share of each intent's content words that its prompt holds, (pairs,)."""
    return np.array([coverage(content_words(pair.intent), pair.prompt) for pair in pairs])


def count_new_words(pair: Pair) -> int:
    """Return how many distinct content words of the prompt are not in the intent."""
    return len(set(content_words(pair.prompt)) - set(words(pair.intent)))


def share_of_distinct(prompt: str) -> float:
    """Return the share of distinct word pairs, times that of distinct content words: 1 if nothing comes again."""
    content = [word for word in words(prompt) if word not in FUNCTION_WORDS]
    return repetition(prompt) * (len(set(content)) / len(content) if content else 1.0)


# ---- classifiers


def _classify(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities that each prompt's order is that of a text, and that its manner is its task's, (pairs,) each."""
    fluency, own_task = np.ones(len(pairs)), np.ones(len(pairs))
    halves = np.array([_half(pair.intent) for pair in pairs])
    for half in (0, 1):
        here = np.flatnonzero(halves == half)
        if not len(here):
            continue
        prompts = [pairs[i].prompt for i in here]
        classifiers = _classifiers(1 - half)
        fluency[here] = classifiers.fluency.predict_proba(prompts)[:, 1]
        column = {task: n for n, task in enumerate(classifiers.task.classes_)}
        probabilities = classifiers.task.predict_proba(prompts)
        for row, i in enumerate(here):
            if pairs[i].task in column:  # a user's own task has no manner that is known
                own_task[i] = probabilities[row, column[pairs[i].task]]
    return fluency, own_task


def _half(intent: str) -> int:
    """Return the half of the gold set that an intent belongs to; the other half's classifiers judge it."""
    return stable_id("gold", intent) % 2


@cache
def _classifiers(half: int) -> Classifiers:
    """Train the classifiers on one half of the gold pairs of all shipped tasks."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pairs = [pair for task in shipped_tasks() for pair in gold_pairs(task) if _half(pair.intent) == half]
    fluency = make_pipeline(
        TfidfVectorizer(analyzer=_class_ngrams, sublinear_tf=True, min_df=2),
        LogisticRegression(C=20, max_iter=400, class_weight="balanced"),
    )
    prose = [pair.prompt for pair in pairs if is_prose([other.prompt for other in gold_pairs(pair.task)])]
    rng = np.random.default_rng(0)
    shuffled = [" ".join(rng.permutation(prompt.split())) for prompt in prose for _ in range(SHUFFLES)]
    fluency.fit([*prose, *shuffled], [1] * len(prose) + [0] * len(shuffled))
    task = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
        LogisticRegression(C=10, max_iter=400, class_weight="balanced"),
    )
    task.fit([pair.prompt for pair in pairs], [pair.task for pair in pairs])
    return Classifiers(fluency, task)


def _class_ngrams(prompt: str) -> list[str]:
    """Return pairs and triples of word classes: a function word itself, of others their ending; punctuation has its own."""
    classes = ["<start>"]
    for word in prompt.split():
        classes.append(_word_class(word.lower().strip(".,;:")))
        if word[-1] in ".,;:":
            classes.append(word[-1])
    classes.append("<end>")
    return [" ".join(classes[i : i + n]) for n in (2, 3) for i in range(len(classes) - n + 1)]


@lru_cache(maxsize=1 << 16)
def _word_class(word: str) -> str:
    if word in FUNCTION_WORDS:
        return word
    return "w" + next((ending for ending in ENDINGS if word.endswith(ending) and len(word) > len(ending) + 2), "")
