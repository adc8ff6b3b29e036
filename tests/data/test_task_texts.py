import sys

import pytest

from aquila_jax.data import TextData
from aquila_jax.data.sources import read_split
from aquila_jax.data.task_texts import TaskText, read_task_texts
from aquila_jax.errors import UserError

MODULE = """
import seqio
import tensorflow as tf

ROWS = {{"inputs": ["2 + 2 =", "the sky is"], "targets": [" 4", " blue, 蓝"]}}
FEATURES = {{name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ROWS}}
source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(ROWS),
    splits=["test"],
)
for name, preprocessors in {{
    "{prefix}_kept": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    "{prefix}_spelled": [
        lambda d, output_features: seqio.preprocessors.tokenize(
            d, output_features, copy_pretokenized=False
        ),
        seqio.preprocessors.append_eos,
    ],
}}.items():
    seqio.TaskRegistry.add(
        name, source=source, output_features=FEATURES, preprocessors=preprocessors
    )
"""
EXAMPLES = [TaskText("2 + 2 =", " 4"), TaskText("the sky is", " blue, 蓝")]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A person's module that registers two tasks of one text."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks_of_a_person.py").write_text(MODULE.format(prefix="person"))
    sys.path.insert(0, str(folder))
    yield "tasks_of_a_person"
    sys.path.remove(str(folder))


@pytest.mark.parametrize("name", ["person_kept", "person_spelled"])
def test_text_is_what_was_there_before_any_tokenizer(module, name):
    assert read_task_texts(name, "test", module) == EXAMPLES
    assert read_task_texts(name, "test", module, limit=1) == EXAMPLES[:1]


def test_the_librarys_own_tasks_give_their_documents(text_data: TextData):
    from aquila_jax.data.tasks import register_task

    task = register_task("sotu_en", text_data.text_dir, text_data.tokenizer_path, 16)
    examples = read_task_texts(task.name)
    assert {example.context for example in examples} == {""}
    documents = [d.text for d in read_split("sotu_en", text_data.text_dir, "validation")]
    assert "".join(example.text for example in examples) == "".join(documents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("person_kept", "train"), "no split 'train'; there are test"),
        (("absent",), "no task or mixture 'absent': import the module"),
        (("person_kept", "test", "no_such_module"), "cannot import no_such_module"),
    ],
)
def test_what_is_not_there_is_told(module, arguments, message):
    read_task_texts("person_kept", "test", module)
    with pytest.raises(UserError, match=message):
        read_task_texts(*arguments)
