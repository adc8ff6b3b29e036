"""Conversations written as a model's chat template writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aquila_jax.data.gguf_tokenizer import GGUF, read_chat_settings
from aquila_jax.data.pretrained_tokenizer import find_tokenizer
from aquila_jax.errors import UserError

ROLES = ("system", "user", "assistant")
_SETTINGS_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A chat template: a Jinja program from the model's files, run where it can reach nothing.

    Attributes:
        source: the program.

    Args:
        source: the program.
        special: what it may name: `bos_token`, `eos_token` and the like.

    Raises:
        UserError: jinja2 is not installed, or the program is damaged.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError(
                "chat templates need the jinja2 package: pip install 'aquila-jax[data]'"
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise UserError(f"the chat template refuses this conversation: {message}")

        environment.globals["raise_exception"] = refuse
        self.source = source
        self._special = special
        self._errors = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is damaged: {error}") from error

    def render(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: objects with `role`, one of `ROLES`, and `content`, a text.
            add_generation_prompt: whether the text ends where the assistant begins to speak.

        Raises:
            UserError: a message is not valid, or the template refuses the conversation.
        """
        check_messages(messages)
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except self._errors as error:
            raise UserError(f"the chat template cannot write this: {error}") from error


def check_messages(messages: Sequence[Any]) -> None:
    """A conversation that can be written.

    Raises:
        UserError: it has no messages, or one of them has no known role or no text.
    """
    if not messages:
        raise UserError("a conversation needs a message")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(
                f"a message has a role, one of {', '.join(ROLES)}, and a content, not {message!r}"
            )


def open_chat_template(path: str | Path) -> ChatTemplate:
    """The chat template of a pretrained model.

    Args:
        path: a directory that holds a tokenizer, or a GGUF file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = find_tokenizer(path)
    settings = _read_settings(file)
    template = settings.get("chat_template")
    if (file.parent / _TEMPLATE_FILE).is_file():
        template = (file.parent / _TEMPLATE_FILE).read_text(encoding="utf-8")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise UserError(f"{path} has no chat template: use a model tuned for chat, or generate")
    special = {
        name: token.get("content", "") if isinstance(token, dict) else token
        for name, token in settings.items()
        if name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return ChatTemplate(template, {name: token or "" for name, token in special.items()})


def _read_settings(file: Path) -> dict[str, Any]:
    if file.suffix == GGUF:
        return read_chat_settings(file)
    settings = file.parent / _SETTINGS_FILE
    if not settings.is_file():
        return {}
    try:
        return json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{settings} is not JSON ({error}); fetch it again") from error
