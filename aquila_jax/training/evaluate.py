"""Validation of a run's newest checkpoint, without training."""

import jax
import jax.numpy as jnp

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.evaluation.perplexity import make_eval_step, validation_losses
from aquila_jax.nn import Transformer
from aquila_jax.sharding import DEFAULT_RULES, Layout
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import TrainRun, differences


def evaluate(run: TrainRun) -> dict[str, float]:
    """Loss in nats per token of the newest checkpoint of MODEL_DIR, by language and "mean".

    Raises:
        UserError: there is no checkpoint, or it holds another model.
    """
    checkpoints = open_existing(run.path)
    step = checkpoints.latest_step or 0
    saved = ModelConfig.from_dict(checkpoints.read_meta(step)["config"])
    if saved != run.model:
        raise UserError(
            f"{run.model_dir} holds another model: {differences(saved, run.model)}; choose "
            "another MODEL_DIR, or the settings it was made with"
        )
    layout = Layout(run.mesh.build(), {**DEFAULT_RULES, **run.sharding_rules})
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        axes.abstract_params(saved),
        layout.params(saved),
    )
    params = checkpoints.restore_params(step, abstract)
    checkpoints.close()
    run.data.prepare()
    model = Transformer(saved, dtype=jnp.dtype(run.dtype))
    batches = run.data.validation_batches(run.eval_batches)
    return validation_losses(make_eval_step(model), params, batches)
