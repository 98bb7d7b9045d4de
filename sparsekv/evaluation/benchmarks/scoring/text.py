"""Words that count when answers are compared, and their overlap (F1 as in SQuAD, Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.scoring.packages import package

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_MARKS = dict.fromkeys(map(ord, string.punctuation))
# The Chinese marks that LongBench and InfiniteBench drop; 《〈〉 and ． are not among them.
_CHINESE_MARKS = dict.fromkeys(
    map(
        ord,
        "–—‘’‛“”„‟…‧、。〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿﹏！＂＃＄％＆＇（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～｟｠｡｢｣､",
    )
)


def words(text: str) -> list[str]:
    """Lower-case words without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_MARKS)).split()


def chinese_characters(text: str) -> str:
    """Lower-case text without white space and without ASCII and Chinese punctuation."""
    return "".join(text.lower().translate(_ASCII_MARKS | _CHINESE_MARKS).split())


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them, normalised by `chinese_characters`."""
    return [word for word in map(chinese_characters, package("jieba").lcut(text)) if word]


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the tokens that both have, 0 to 1."""
    same = (Counter(prediction) & Counter(answer)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)
