"""Validation of a run's newest checkpoint, without training."""

import sys

from aquila_jax.config import ModelConfig
from aquila_jax.evaluation.perplexity import make_eval_step, validation_losses
from aquila_jax.training.checkpoints import open_existing
from aquila_jax.training.run import TrainRun, abstract_params, model_on_mesh, place_batch
from aquila_jax.training.start import check_vocabulary


def evaluate(run: TrainRun) -> dict[str, float]:
    """Loss in nats per token of the newest checkpoint of MODEL_DIR, by language and "mean".

    Raises:
        UserError: there is no checkpoint, or it holds another model or vocabulary.
    """
    with open_existing(run.path) as checkpoints:
        step = checkpoints.latest_step or 0
        meta = checkpoints.read_meta(step)
        run.check_own(ModelConfig.from_dict(meta["config"]))
        model, layout = model_on_mesh(run)
        run.data.prepare()
        unchecked = check_vocabulary(run.data, meta["data"]["vocabulary"], run.model_dir)
        if unchecked:
            print(unchecked, file=sys.stderr)
        params = checkpoints.restore_params(step, abstract_params(run.model, layout))
    batches = {
        language: [place_batch(batch, layout, run.data.batch_size) for batch in batches]
        for language, batches in run.data.validation_batches(run.eval_batches).items()
    }
    return validation_losses(make_eval_step(model), params, batches)
