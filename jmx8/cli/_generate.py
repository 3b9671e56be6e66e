"""`jmx8 generate`: prints a text as a model writes it."""


class TextPrinter:
    """Prints tokens as text as soon as they form whole characters."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._printed = ""

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # A trailing replacement character may be the start of a longer sequence.
        if not text.endswith("\ufffd"):
            self._print(text)

    def finish(self) -> None:
        self._print(self._tokenizer.decode(self._tokens))
        print()

    def _print(self, text: str) -> None:
        print(text.removeprefix(self._printed), end="", flush=True)
        self._printed = text
