"""A model as lm-eval runs it: quiet, with tokens that are kept, and with a note of what was cut off."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

_ROOM = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing to lm-eval


def language_model(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    """lm-eval's `HFLM` of a model, watched."""
    from lm_eval.models.huggingface import HFLM

    encoded = _encoder(tokenizer)

    class Watched(HFLM):
        """lm-eval's model without its own progress bars, which it shows whatever the environment says.

        It keeps tokens, since all jobs of a sweep ask the same, and notes what was cut off.
        """

        truncated: set[tuple[str, ...]]

        def tok_encode(
            self, string: str, add_special_tokens: Any = None, left_truncate_len: Any = None, **kw: Any
        ) -> Any:
            if kw or left_truncate_len or not isinstance(string, str):
                return super().tok_encode(string, add_special_tokens, left_truncate_len, **kw)
            if add_special_tokens is None:
                return list(encoded(string, None, super().tok_encode))
            return list(encoded(string, add_special_tokens, super().tok_encode))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kw: Any) -> Any:
            fitting = []
            for texts, prefix, continuation in requests:  # windows of a long text have no texts
                if texts and len(prefix) + len(continuation) > self.max_length + 1:
                    self.truncated.add(texts_of(texts))
                # lm-eval cuts prefixes from the left, and stops where a continuation alone is too long.
                fitting.append((texts, prefix, continuation[-self.max_length :]))
            return super()._loglikelihood_tokens(fitting, *args, **kw)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until([self._fitting(r) for r in requests], disable_tqdm=disable_tqdm)

        def _fitting(self, request: Any) -> Any:
            """A request that leaves half of what the model reads to the question, if it asks for all and more."""
            context, settings = request.args
            room = next((settings[n] for n in _ROOM if settings.get(n) is not None), self.max_gen_toks)
            if room >= self.max_length:
                room = self.max_length // 2
                request = replace(request, arguments=(context, settings | {"max_gen_toks": room}))
            if len(self.tok_encode(context)) > self.max_length - room:
                self.truncated.add(texts_of(request.args))
            return request

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    watched = Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    watched.truncated = set()
    return watched


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any) -> Any:
    """Remembers the tokens of what was encoded once."""
    known: dict[tuple[str, Any], tuple[int, ...]] = {}

    def encoded(string: str, special: Any, encode: Any) -> tuple[int, ...]:
        if (string, special) not in known:
            if len(known) > 1 << 17:
                known.clear()
            known[string, special] = tuple(encode(string, special))
        return known[string, special]

    return encoded


def texts_of(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """What tells one request from others: many have the same context, an empty one above all."""
    return tuple(argument for argument in arguments if isinstance(argument, str))
