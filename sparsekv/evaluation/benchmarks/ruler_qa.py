"""RULER's two question answering tasks: documents, of which one (qa_1) or two together (qa_2) hold the answer.

The wording around the documents is NVIDIA's (github.com/hsiehjackson/RULER, scripts/data/synthetic/constants.py and
qa.py); the documents are invented articles in place of SQuAD's and HotpotQA's.
"""

from random import Random

from sparsekv.evaluation.benchmarks.ruler_articles import World
from sparsekv.evaluation.benchmarks.ruler_prompt import Prompt, scatter

TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
DOCUMENTS = "The following are given documents.\n\n{documents}\n\n"


def one_document(rng: Random, amount: int) -> Prompt:
    """A question that one document answers, among others with `amount` sentences."""
    world = World(rng)
    article, _ = world.pair()
    question, answer = rng.choice(article.questions)
    depths = [rng.random()]
    others = [text for _, text in _others(world, amount)]
    return _prompt(scatter([article.text()], others, depths), question, answer)


def two_documents(rng: Random, amount: int) -> Prompt:
    """A question about the person whom one document names and another describes; all documents have titles."""
    world = World(rng)
    pair = world.pair()
    question, answer = rng.choice(pair[1].questions)
    depths = [rng.random() for _ in pair]
    others = [f"{title}\n{text}" for title, text in _others(world, amount)]
    return _prompt(scatter([f"{a.title}\n{a.text()}" for a in pair], others, depths), question, answer)


def _others(world: World, amount: int) -> list[tuple[str, str]]:
    """Titles and texts of other articles, `amount` sentences together; the last article may be cut short."""
    result = []
    while amount > 0:
        for article in world.pair():
            if amount > 0:
                result.append((article.title, article.text(amount)))
                amount -= len(article.sentences)
    return result


def _prompt(documents: list[str], question: str, answer: str) -> Prompt:
    numbered = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, start=1))
    return Prompt(
        f"{TASK}\n\n{DOCUMENTS.format(documents=numbered)}", f"{TASK}\n\nQuestion: {question} ", "Answer:", [answer]
    )
