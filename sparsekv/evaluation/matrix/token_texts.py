"""Which part of a text each of its tokens says."""

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders write for a part of a character


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the decoded text.

    A character whose bytes several tokens share belongs to the last of them; the others have "".
    """

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = done = 0  # ids[start:done] have their text; some decoders need them to know where a word goes on
    for end in range(1, len(ids) + 1):
        text = decode(start, end)
        if text.endswith(INCOMPLETE) and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(decode(start, done)) :])
            start, done = done, end
    return texts
