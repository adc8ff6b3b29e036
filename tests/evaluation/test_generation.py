import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.generation import Generator
from aquila_jax.evaluation.sampling import Sampling
from aquila_jax.sharding import Layout, MeshShape

from .letters import Letters

PROMPTS = ["AB", "", "HELLO THERE", "X"]
NEW = 10


@pytest.fixture(scope="module")
def mixture(tiny):
    return dataclasses.replace(tiny, num_layers=4, moe_every=2, num_experts=4, experts_per_token=2)


@pytest.fixture(scope="module")
def params(mixture, random_params):
    return jax.tree.map(jnp.asarray, random_params(mixture))


@pytest.fixture(scope="module")
def generator(mixture, params):
    return Generator(params, mixture, Letters(), batch_size=3, steps_per_call=4)


def greedy(config, params, reference_logits, prompt):
    """Token by token, every time from the whole text."""
    ids = list(prompt)
    for _ in range(NEW):
        logits = reference_logits(config, params, np.array([ids]))
        ids.append(int(np.argmax(logits[0, -1])))
    return ids[len(prompt) :]


def test_tokens_equal_those_without_a_cache(mixture, params, generator, reference_logits):
    found = generator.generate(PROMPTS, max_new_tokens=NEW, stop_at_eos=False)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = Letters().encode(prompt) or [Letters.bos_id]
        assert list(completion.ids) == greedy(mixture, params, reference_logits, ids)
        assert (completion.text, completion.reason) == (Letters().decode(completion.ids), "length")


def test_a_stream_is_the_whole_text_in_pieces(generator):
    (whole,) = generator.generate([PROMPTS[2]], max_new_tokens=NEW)
    pieces = list(generator.stream(PROMPTS[2], max_new_tokens=NEW))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_a_stop_string_ends_a_text(generator):
    (whole,) = generator.generate([PROMPTS[0]], max_new_tokens=NEW, stop_at_eos=False)
    stop = whole.text[4:7]
    (cut,) = generator.generate([PROMPTS[0]], max_new_tokens=NEW, stops=[stop], stop_at_eos=False)
    assert (cut.text, cut.reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_draws_do_not_depend_on_the_batch(mixture, params, generator):
    alone = Generator(params, mixture, Letters(), batch_size=1, steps_per_call=3)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=5)
    draw = {"max_new_tokens": NEW, "sampling": sampling, "stop_at_eos": False}
    found = generator.generate(PROMPTS, **draw)
    assert found == alone.generate(PROMPTS, **draw)
    assert found != generator.generate(
        PROMPTS, **{**draw, "sampling": dataclasses.replace(sampling, seed=6)}
    )


def test_a_text_ends_where_the_context_does(mixture, generator):
    prompt = "A" * (mixture.context_length - 3)
    (found,) = generator.generate([prompt], max_new_tokens=NEW, stop_at_eos=False)
    assert (len(found.ids), found.reason) == (3, "length")


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("A" * 32, {}, "32 tokens leaves no room in a context of 32"),
        ([3, 99], {}, "token 99 is outside"),
        ("A", {"max_new_tokens": 0}, "max_new_tokens"),
        ("A", {"stops": "A"}, "list of strings"),
    ],
)
def test_mistakes_are_said(generator, prompt, options, says):
    with pytest.raises(UserError, match=says):
        generator.generate([prompt], **options)


def test_a_tokenizer_of_another_model_is_refused(params, mixture):
    small = dataclasses.replace(mixture, vocab_size=60)
    with pytest.raises(UserError, match="61 ids"):
        Generator(params, small, Letters())


def test_a_mesh_says_what_one_device_says(mixture, params, generator):
    layout = Layout(MeshShape(data=2, fsdp=2, expert=2).build())
    meshed = Generator(params, mixture, Letters(), batch_size=8, layout=layout)
    asked = PROMPTS[:3]  # fewer rows than the batch
    assert meshed.generate(asked, max_new_tokens=NEW) == generator.generate(
        asked, max_new_tokens=NEW
    )
