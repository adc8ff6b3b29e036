"""The tasks of lm-evaluation-harness, done by our models.

The only module that imports the harness (`lm_eval`), and only when it is used.
"""

import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aquila_jax.data.chat import ChatTemplate
from aquila_jax.errors import UserError
from aquila_jax.evaluation.generation import Generator
from aquila_jax.evaluation.sampling import Sampling
from aquila_jax.evaluation.scoring import Scorer
from aquila_jax.evaluation.windows import windows

# What `--model` calls our models.
NAME = "aquila"
# What the harness's own models generate where a task does not say.
_MAX_NEW_TOKENS = 256
# Other frameworks' names for it, the first one that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of generation that a task may give.
_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)

# Opens a model: from the harness's `--model_args` and flags to what `language_model` takes.
Opener = Callable[..., tuple[Scorer, Callable[[], Generator], Callable[[], ChatTemplate]]]


class Answers:
    """What the harness asks of a model, answered; `language_model` makes it one of its `LM`s.

    Args:
        scorer: gives log-likelihoods.
        open_generator: gives what continues texts, where a task asks for it.
        open_template: gives the chat template, where a task is asked as a conversation.
        max_new_tokens: generated where a task does not say.
        seed: of draws, where a task draws.
    """

    cache_hook: Any

    def __init__(
        self,
        scorer: Scorer,
        open_generator: Callable[[], Generator],
        open_template: Callable[[], ChatTemplate],
        *,
        max_new_tokens: int = _MAX_NEW_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._scorer, self._open_template = scorer, open_template
        # Its parameters lie in memory a second time, so it is made when it is first needed.
        self._open_generator = functools.cache(open_generator)
        self._max_new_tokens, self._seed = max_new_tokens, seed

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For `(context, continuation)`: nats, and whether greedy decoding would say it."""
        del disable_tqdm
        scores = self._scorer.score_texts([request.args for request in requests])
        found = [(score.log_likelihood, score.is_greedy) for score in scores]
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """For `(text,)`: nats of all of it, in windows that share one token of context."""
        del disable_tqdm
        pairs, owners = [], []
        length = self._scorer.max_length
        for number, request in enumerate(requests):
            ids = self._scorer.tokenizer.encode(request.args[0])
            own = [*windows(ids, start_id=self._scorer.start_id, length=length, stride=length)]
            pairs += own
            owners += [number] * len(own)
        found = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(pairs), strict=True):
            found[owner] += score.log_likelihood
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For `(context, settings)`: the text that follows, without what ends it."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            prompts = [requests[number].args[0] for number in numbers]
            texts = self._generate(prompts, requests[numbers[0]].args[1])
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        self._remember("generate_until", requests, found)
        return found

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's own template writes it."""
        template = self._open_template()
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's log."""
        return self._open_template().source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart, for the harness's cache."""
        return f"{NAME}-{self._scorer.tokenizer.digest}"

    def _generate(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        if unknown := sorted(set(settings) - set(_SETTINGS)):
            raise UserError(
                f"a task sets {', '.join(unknown)} of generation; known are {', '.join(_SETTINGS)}"
            )
        until = settings.get("until") or []
        given = [settings[name] for name in _LENGTHS if settings.get(name) is not None]
        max_new_tokens = int(given[0]) if given else self._max_new_tokens
        room = self._scorer.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_new_tokens} tokens, and the context is "
                f"{self._scorer.max_length}: set --gen_kwargs max_gen_toks to fewer"
            )
        # As elsewhere in the harness, a prompt that is too long loses its beginning.
        ids = [self._scorer.tokenizer.encode(prompt)[-room:] for prompt in prompts]
        completions = self._open_generator().generate(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=_sampling(settings, self._seed),
            stops=[until] if isinstance(until, str) else [stop for stop in until if stop],
        )
        return [completion.text for completion in completions]

    def _remember(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)


def _sampling(settings: Mapping[str, Any], seed: int) -> Sampling:
    """Greedy, unless a task says that it draws."""
    temperature = float(settings.get("temperature") or 0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(
        temperature or 1.0, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1), seed
    )


def language_model(
    scorer: Scorer,
    open_generator: Callable[[], Generator],
    open_template: Callable[[], ChatTemplate],
    **options: Any,
) -> Any:
    """A model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        scorer: gives log-likelihoods.
        open_generator: gives what continues texts, where a task asks for it.
        open_template: gives the chat template, where a task is asked as a conversation.
        options: further arguments of `Answers`.

    Raises:
        UserError: the harness is not installed.
    """
    return _adapter()(scorer, open_generator, open_template, **options)


def run_command_line(arguments: Sequence[str], open_parts: Opener) -> None:
    """The harness's own command line, `lm_eval`, which then knows `--model aquila`.

    Args:
        arguments: as after `lm_eval`.
        open_parts: opens a model; its keywords are the `--model_args`.

    Raises:
        UserError: the harness is not installed, or a model argument is unknown.
    """
    model = _by_arguments(open_parts)
    # The harness registers its own models only where there are none yet.
    importlib.import_module("lm_eval.models")
    importlib.import_module("lm_eval.api.registry").register_model(NAME)(model)
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    finally:
        sys.argv = before


# What the harness passes to every model, and what says nothing to ours: where to compute is JAX's.
_OTHERS = ("device", "max_batch_size")


@functools.cache
def _adapter() -> type[Any]:
    try:
        model = importlib.import_module("lm_eval.api.model")
    except ImportError as error:
        raise UserError("this needs lm-evaluation-harness: pip install lm-eval==0.4.13") from error
    return type("AquilaLM", (Answers, model.LM), {})


@functools.cache
def _by_arguments(open_parts: Opener) -> type[Any]:
    """The model that `--model_args` describe; one class, as a name is registered for one alone."""
    known = [*inspect.signature(open_parts).parameters]

    class Aquila(_adapter()):
        def __init__(self, **given: Any) -> None:
            given = {name: value for name, value in given.items() if name not in _OTHERS}
            if unknown := sorted(set(given) - set(known)):
                raise UserError(
                    f"no model argument {', '.join(unknown)}; there are {', '.join(known)}"
                )
            super().__init__(*open_parts(**given))

    return Aquila
