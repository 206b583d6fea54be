"""Word-level tokenizer with a vocabulary small enough to print.

- One word, one token, so that every attention map belongs to a word.
- A text is `[SOS] command ? [YES] reason [EOS]`. Every command ends in `?`, whatever the user typed. The model answers
  at that token, so the attention of `?` shows where the answer looked (PaliGemma ends its prompt in a newline).
- The vocabulary comes from the grammar of commands.py, so models that were trained on different data share it.

    python tokenizer.py "is the light red?"
"""
import re
import sys

import config
from commands import vocabulary

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
    """Tables from words to ids and back. The special tokens come first, then the other words in sorted order.

    words: the vocabulary, with or without the special tokens.
    """

    def __init__(self, words):
        self.words = SPECIAL + sorted(set(words) - set(SPECIAL))
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, text):
        """Ids of the words of `text`, without special tokens around them; an unknown word is [UNK]."""
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

    def prompt(self, command):
        """Ids of `[SOS] command ?`. The one `?` replaces all punctuation at the end of the command."""
        return [SOS] + self.encode(re.sub(r"[\W_]+$", "", command) + PROMPT_END)

    def encode_text(self, command, answer, reason):
        """(ids of a whole text, length of its prompt). answer: True, False, or None for a description."""
        prompt = self.prompt(command)
        verdict = [] if answer is None else [YES if answer else NO]
        return prompt + verdict + self.encode(reason) + [EOS], len(prompt)


def pad(rows, length=None, left=False):
    """Rows of ids, made equally long with [PAD]: a list of N lists of `length` ids, by default that of the longest.

    left: pad before the text, as generation needs it (every prompt then ends in the last column). Raises ValueError
    when a row is longer than `length`: cutting a command would change what it asks.
    """
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into {length}")
    padded = []
    for row in rows:
        pads = [PAD] * (length - len(row))
        padded.append(pads + list(row) if left else list(row) + pads)
    return padded


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) == 2 else 2)
    with config.for_people():
        tokenizer = Tokenizer(vocabulary())
        print(f"vocabulary: {len(tokenizer)} words")
        ids = tokenizer.prompt(sys.argv[1])
        for i in ids:
            print(f"{i:5d}  {tokenizer.words[i]}")
        if UNK in ids:
            print("[UNK]: a word that is not in the vocabulary")
