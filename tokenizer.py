"""Word-level tokenizer with a vocabulary small enough to print.

- One word, one token, so that every attention map belongs to a word.
- A text is `[SOS] command ? [YES] reason [EOS]`. Every command ends in `?`, whatever the user typed: the model answers
  at that token, so "where the answer looked" is the attention of `?` (PaliGemma ends its prompt in a newline).
- The vocabulary comes from the grammar of commands.py, not from a data set: models trained on different data share it.

    python tokenizer.py "is the light red?"
"""
import re
import sys
from difflib import get_close_matches

SPECIAL = ["[PAD]", "[SOS]", "[EOS]", "[UNK]", "[YES]", "[NO]"]
PAD, SOS, EOS, UNK, YES, NO = range(len(SPECIAL))
PROMPT_END = "?"
IGNORE = -100                 # target of a token that is not learned: command words and padding (torch's default)
_PIECES = re.compile(r"\[[A-Z]+\]|\w+(?:'\w+)?|[^\w\s]")


def split_words(text):
    """Lower-case words and punctuation marks of `text`; special tokens keep their capitals.

    >>> split_words("Is it red?  [YES]")
    ['is', 'it', 'red', '?', '[YES]']
    """
    return [piece if piece in SPECIAL else piece.lower() for piece in _PIECES.findall(text)]


class Tokenizer:
    """Word <-> id tables. words: the vocabulary, with or without the special tokens, which
    come first; the ids of the rest follow sorted order."""

    def __init__(self, words):
        self.words = SPECIAL + sorted(set(words) - set(SPECIAL))
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, text):
        """Ids of the words of `text`, without special tokens around it; an unknown word is [UNK]."""
        return [self.ids.get(word, UNK) for word in split_words(text)]

    def decode(self, ids):
        """Text of `ids` up to [EOS], without [PAD], [SOS] and [EOS]."""
        words = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, SOS):
                words.append(self.words[i])
        return " ".join(words)

    def unknown(self, text):
        """[(word, nearest known word or None)] for the words of `text` that are not in the vocabulary."""
        known = self.words[len(SPECIAL):]
        return [(word, next(iter(get_close_matches(word, known, 1)), None))
                for word in split_words(text) if word not in self.ids]

    def prompt(self, command):
        """[SOS] command ? as ids. Final punctuation of the command is replaced by the one `?`."""
        words = split_words(command)
        while words and not words[-1][0].isalnum():
            words.pop()
        return [SOS] + [self.ids.get(word, UNK) for word in words] + [self.ids[PROMPT_END]]

    def example(self, command, answer, reason):
        """Ids of a whole text and the length of its prompt. answer: True, False, or None ("describe the scene")."""
        prompt = self.prompt(command)
        verdict = [] if answer is None else [YES if answer else NO]
        return prompt + verdict + self.encode(reason) + [EOS], len(prompt)


def pad(rows, length=None, left=False):
    """Rows of ids, made equally long with [PAD]: list of list of int, (N, max length or `length`).

    left: pad before the text, as generation wants (every prompt then ends in the last column). Raises ValueError
    when a row is longer than `length`: cutting a command would change what it asks.
    """
    length = max(map(len, rows)) if length is None else length
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into {length}")
    return [[PAD] * (length - len(r)) + list(r) if left else list(r) + [PAD] * (length - len(r)) for r in rows]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) == 2 else 2)
    from commands import vocabulary  # here, since commands.py has no need of this file and this file none of it
    tokenizer = Tokenizer(vocabulary())
    ids = tokenizer.prompt(sys.argv[1])
    print(f"vocabulary: {len(tokenizer)} words")
    for i in ids:
        print(f"{i:5d}  {tokenizer.words[i]}")
    for word, close in tokenizer.unknown(sys.argv[1]):
        print(f"warning: '{word}' is not in the vocabulary" + (f", did you mean '{close}'?" if close else ""))
