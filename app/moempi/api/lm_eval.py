"""The model `moempi` of lm-evaluation-harness; importing this module registers it.

Every rank runs the same program of the harness, which makes the same requests in the same order; the ranks compute them
together.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moempi.api.llm import LLM, Message
from moempi.api.results import Generated, Scored
from moempi.errors import DataError, UsageError

NAME = "moempi"
NO_EFFECT = ("batch_size", "max_batch_size", "device")
"""Arguments that the harness gives to every model; the engine batches by itself."""
SAME_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Generation arguments that `[sampling]` has by the same names."""
OTHER_KEYS = ("do_sample", "until", "max_gen_toks")

Pair = tuple[Any, list[int], list[int]]
"""A key of the harness's cache of results, the tokens of a context, and the tokens of its continuation."""

log = logging.getLogger(__name__)


class MoempiLM(TemplateLM):  # type: ignore[misc]
    """An LLM as a model of the harness; `weights` and `settings` are the LLM's. All methods are collective.

    `max_length`, `max_gen_toks`, `prefix_token_id`, `add_bos_token` and `chat_template_args` are as for the harness's
    own Hugging Face model.
    """

    def __init__(
        self,
        weights: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._llm = LLM(weights, **{key: value for key, value in settings.items() if key not in NO_EFFECT})
        self.max_length = max_length or self._llm.architecture.max_positions
        self.max_gen_toks = max_gen_toks
        self._prefix_token_id = prefix_token_id
        self._add_bos_token = add_bos_token
        self._chat_template_args = chat_template_args or {}

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None if the model has none."""
        return self._named_token("eos_token", next(iter(self._llm.architecture.eos_tokens), None))

    @property
    def prefix_token_id(self) -> int | None:
        """The token before a text without a context: the begin token, or without one the end token."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        found = self._named_token("bos_token", self._llm.architecture.bos_token)
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps requests that the tokenizer and the chat template have made."""
        return f"{NAME}-{self._llm.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; a text that already begins with the prefix token gets no other."""
        adds = self._add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self.prefix_token_id
        if add_special_tokens is None and prefix is not None:
            adds = False if string.startswith(self._llm.tokenizer.decode_whole([prefix])) else adds
        return self._llm.tokenizer.encode_chat(string) if adds is False else self._llm.tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether it is the greedy one."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or self._llm.rank > 0)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of `max_length` that predict each token once."""
        windows: list[list[Pair]] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(window)) for window in found])
        scores = iter(self._loglikelihood_tokens([pair for of_text in windows for pair in of_text]))
        sums = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, logprob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context before the first of its stop texts."""
        outputs = self._llm.generate(self._prompt(*request.args) for request in requests)
        for request, output in zip(requests, outputs, strict=True):
            _require_success(output)
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return [output.text for output in outputs]

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` it ends with its last message, to go on there."""
        variables = {"add_generation_prompt": add_generation_prompt, **self._chat_template_args}
        try:
            text = self._llm.chat_text(chat_history, template_kwargs=variables)
        except DataError as error:
            log.warning("%s; trying without the system message", error)
            chat_history = [message for message in chat_history if message["role"] != "system"]
            text = self._llm.chat_text(chat_history, template_kwargs=variables)
        return text if add_generation_prompt else _up_to_last_message(text, str(chat_history[-1]["content"]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the chat template, for the harness's log; raises UsageError for another than the default."""
        if chat_template not in (True, False, None, "default"):
            raise UsageError(f"chat_template: {chat_template}: only the default template of a weight file is applied")
        templates = self._llm.chat_templates
        return templates.templates.get("default") if chat_template and templates else None

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **__: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one; contexts are cut on the left."""
        prompts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        results: list[tuple[float, bool]] = []
        for (key, _, continuation), score in zip(requests, self._llm.score(prompts, top_n=1), strict=True):
            _require_success(score)
            first = len(score.tokens) - len(continuation)
            greedy = [next(iter(likeliest)) for likeliest in score.top_logprobs[first:]]
            results.append((sum(score.logprobs[first:]), greedy == score.tokens[first:]))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def _prompt(self, context: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A prompt with the sampling that the generation arguments ask for; its context is cut on the left.

        Raises UsageError for arguments that cannot be followed.
        """
        given = normalize_gen_kwargs(dict(arguments), self.max_gen_toks)
        if unknown := given.keys() - {*SAME_KEYS, *OTHER_KEYS}:
            raise UsageError(f"gen_kwargs: {', '.join(sorted(unknown))}: not supported")
        length = self.max_length - given["max_gen_toks"]
        if length < 1:
            raise UsageError(f"gen_kwargs: {given['max_gen_toks']} tokens to generate leave none of {self.max_length}")
        return {
            "tokens": self.tok_encode(context)[-length:],
            "max_tokens": given["max_gen_toks"],
            "stop": [text for text in given["until"] if text],
            **{key: given[key] for key in SAME_KEYS if key in given},
        }

    def _named_token(self, name: str, otherwise: int | None) -> int | None:
        """The special token that the checkpoint calls `name`; `otherwise` if the weight file has no such names."""
        if self._llm.chat_templates is None:
            return otherwise
        return self._llm.tokenizer.special_token(self._llm.chat_templates.special_tokens.get(name, ""))


def _require_success(result: Generated | Scored) -> None:
    if result.error:
        raise DataError(f"request {result.id}: {result.error}")


def _up_to_last_message(text: str, content: str) -> str:
    """The beginning of the text of a conversation that ends with the content of its last message."""
    begin, found, _ = text.rpartition(content.strip())
    if not found:
        raise DataError("the chat template leaves out or changes the last message, so it cannot be continued")
    rest = content.lstrip()
    return begin + (rest if text.startswith(rest, len(begin)) else found)


register_model(NAME)(MoempiLM)
