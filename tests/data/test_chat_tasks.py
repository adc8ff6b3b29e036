import json
import shutil
from typing import Any

import pytest

from aquila_jax.data import ChatData, open_tokenizer
from aquila_jax.data.task_texts import read_task_texts
from aquila_jax.errors import UserError


@pytest.fixture
def chats(tmp_path):
    """Forty prompts, and a conversation of two answers."""
    lines: list[dict[str, Any]] = [
        {"prompt": f"{chr(65 + i % 20)}?", "answer": f"{chr(70 + i % 20)}"} for i in range(40)
    ]
    turns = [("user", "A?"), ("assistant", "B"), ("user", "C?"), ("assistant", "D")]
    messages = [{"role": role, "content": content} for role, content in turns]
    lines.append({"messages": messages})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def task(chats, chatty):
    from aquila_jax.data.chat_tasks import register_chat_task

    return register_chat_task(f"chats_{chats.parent.name}", chats, chatty, 0.25)


def examples(task, split):
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    return [
        (row["inputs"].tolist(), row["targets"].tolist()) for row in dataset.as_numpy_iterator()
    ]


def test_every_answer_is_an_example_with_all_that_is_before_it(task, chatty):
    tokenizer = open_tokenizer(chatty)
    found = examples(task, "train") + examples(task, "validation")
    assert len(found) == 42
    plain = (tokenizer.encode("A?"), [*tokenizer.encode("F"), tokenizer.eos_id])
    assert plain in found
    said = {tokenizer.decode(targets): tokenizer.decode(inputs) for inputs, targets in found}
    first, second = (next(text for text in said if text.startswith(word)) for word in "BD")
    # The second answer follows the first.
    assert said[second].startswith(said[first] + first)


def test_what_is_held_out_is_what_chat_data_holds_out(task, chats, chatty):
    data = ChatData(str(chats), str(chatty), 32, 24, 4, validation_fraction=0.25)
    (batches,) = data.validation_batches(1).values()
    num_answers = sum(len(targets) for _, targets in examples(task, "validation"))
    assert num_answers > 0
    assert batches[0]["loss_weights"].sum() == num_answers


def test_seqios_own_converter_learns_answers_alone(chats, chatty, tmp_path):
    """With a tokenizer whose end is not id 0, which to seqio is padding."""
    import seqio

    from aquila_jax.data.chat_tasks import register_chat_task

    padded = tmp_path / "padded"
    shutil.copytree(chatty, padded)
    words = json.loads((padded / "tokenizer.json").read_text())
    for entry in words["added_tokens"]:
        entry["id"] += 1
    words["model"]["vocab"] = {word: i + 1 for word, i in words["model"]["vocab"].items()}
    words["model"]["vocab"]["<pad>"] = 0
    (padded / "tokenizer.json").write_text(json.dumps(words))
    task = register_chat_task(f"padded_{chats.parent.name}", chats, padded, 0.25)
    converter = seqio.DecoderFeatureConverter(pack=True, loss_on_targets_only=True)
    lengths = {"inputs": 64, "targets": 64}
    dataset = task.get_dataset(sequence_length=lengths, split="train", shuffle=False)
    rows = [*converter(dataset, lengths).as_numpy_iterator()]
    learnt = [
        row["decoder_target_tokens"][row["decoder_loss_weights"] > 0].tolist() for row in rows
    ]
    answers = [i for _, targets in examples(task, "train") for i in targets]
    assert [i for row in learnt for i in row if i] == answers
    assert max(row["decoder_segment_ids"].max() for row in rows) > 1


def test_its_texts_are_measured_as_any_tasks(task):
    texts = read_task_texts(task.name, "train")
    assert len(texts) == len(examples(task, "train"))
    assert ("A?", "F") in [(text.context, text.text) for text in texts]


def test_equal_settings_share_a_task_and_others_never_clash(task, chats, chatty):
    from aquila_jax.data.chat_tasks import register_chat_task

    name = f"chats_{chats.parent.name}"
    assert register_chat_task(name, chats, chatty, 0.25) is task
    assert register_chat_task(name, chats, chatty, 0.5).name != task.name
    chats.write_text('{"prompt": "A", "answer": "B"}\n')
    assert register_chat_task(name, chats, chatty, 0.25).name != task.name
    chats.write_text('{"prompt": "A"}\n')
    with pytest.raises(UserError, match="line 1: there is no answer"):
        register_chat_task(name, chats, chatty)
