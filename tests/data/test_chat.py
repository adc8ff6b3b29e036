import json

import pytest

from aquila_jax.data.chat import ChatTemplate, open_chat_template
from aquila_jax.errors import UserError

SOURCE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def test_a_conversation_ends_where_the_assistant_begins():
    template = ChatTemplate(SOURCE, {"eos_token": "<e>"})
    assert template.render(HELLO) == "[user] hello<e>[assistant] "
    assert template.render(HELLO, add_generation_prompt=False) == "[user] hello<e>"


def test_templates_reach_nothing():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(UserError, match="cannot write"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "messages", [[], ["hi"], [{"role": "user"}], [{"role": "x", "content": ""}]]
)
def test_messages_that_are_none_are_refused(messages):
    with pytest.raises(UserError):
        ChatTemplate(SOURCE, {}).render(messages)


def test_a_refusal_of_the_template_is_said():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UserError, match="roles must alternate"):
        template.render(HELLO)


def test_damaged_and_absent_templates_are_said(tmp_path):
    with pytest.raises(UserError, match="damaged"):
        ChatTemplate("{% for %}", {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no chat template"):
        open_chat_template(tmp_path)


@pytest.mark.parametrize("where", ["string", "list", "file"])
def test_templates_are_found_where_models_keep_them(tmp_path, where):
    (tmp_path / "tokenizer.json").write_text("{}")
    template = [{"name": "default", "template": SOURCE}] if where == "list" else SOURCE
    settings = {"eos_token": {"content": "<e>"}, "chat_template": template}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_chat_template(tmp_path).render(HELLO) == "[user] hello<e>[assistant] "
